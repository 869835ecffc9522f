"""The files that keep what became of mutants: what is written reads back, and a run changes what it judged alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from guards import ROOT, published, table

from refgrid.dataset.case import SIZES, Size
from refgrid.mutants import report as report_parts
from refgrid.mutants.baseline import CHECKS
from refgrid.mutants.judging import Fate, Judgement
from refgrid.mutants.kept import aged, keep, merged, read, settled, to_dict, to_json, to_page, write_files
from refgrid.mutants.parts import Parts
from refgrid.mutants.report import Column, Report, Row, Run, differing, false_alarms, plain, rows, unsound
from refgrid.mutants.running import Task, Told
from refgrid.mutants.table import Mutant, MutantError
from refgrid.records.record import Verdict
from refgrid.report.matrix import escaped
from refgrid.sources import Sources

KEPT = ROOT / "results" / "mutants"
FOLDERS = {".": "cpu", "on_h200": "cuda"}
STALE = {
    ".": "stale: nox -s mutants",
    "on_h200": "stale: refgrid mutants --restate --device cuda --output results/mutants/on_h200",
}
TABLE = list(table().values())
ONE, TWO, GPU = TABLE[0], TABLE[1], next(mutant for mutant in TABLE if mutant.device == "cuda")
ALARMS = dict.fromkeys(CHECKS, (1, 2))
CPU = Run("2026-11-21", "cpu", ("small",), {"python": "3"}, ALARMS, ("gemm_n1 m1, torch: crash: killed by SIGSEGV",))
CUDA = Run("2026-11-22", "cuda", ("small", "medium"), {"gpu": "NVIDIA H200", "python": "3"}, ALARMS)
CAUGHT = Judgement("edge", "caught", "mismatch", "torch", "a line\nand another", 0.5, {"document 1": True})
ABSENT = Judgement("edge", "not-run", reason="missing")


PARTS = dict.fromkeys(report_parts.PARTS, "1")


def parts(_mutant: Mutant, _device: str, _size: str) -> dict[str, str]:
    return PARTS


def report(run: Run, found: Mapping[str, Judgement], elsewhere: Sequence[Mutant] = ()) -> Report:
    here = [mutant for mutant in TABLE if mutant.id in found]
    told = [
        (Task("", mutant.where, "edge", (mutant,), run.device, ""), Told({mutant.id: found[mutant.id]}, alarms))
        for mutant in here
        for alarms in [{mutant.where.source: {"document 1": False}}]
    ]
    return Report(tuple(replace(row, parts=PARTS) for row in rows(here, told, {}, run)), tuple(elsewhere), CHECKS)


ON_CPU = report(CPU, {ONE.id: CAUGHT, TWO.id: replace(CAUGHT, verdict="error")}, [GPU])


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_kept_report_has_every_mutant_as_it_stands_or_says_that_it_waits_and_none_survived(folder: str) -> None:
    kept = json.loads((KEPT / folder / "mutants.json").read_text())
    known = {one["id"]: one["digest"] for one in (*kept["mutants"], *kept["elsewhere"])}
    today = {mutant.id: mutant.digest for mutant in table().values()}

    assert known == {name: digest for name, digest in today.items() if name not in kept["waiting"]}, STALE[folder]
    assert not known.keys() & {*kept["waiting"]}
    assert unproven(kept) == []
    assert kept["exit_code"] == 0


def unproven(kept: Mapping[str, Any]) -> list[str]:
    """Mutants that are said to be caught where nothing was red."""
    return [
        f"{mutant['id']}, {told['device']} {told['size']}"
        for mutant in kept["mutants"]
        for told in mutant["verdicts"]
        if told["fate"] == "caught" and not (any(map(_red, told["workloads"].values())) or told.get("self_test"))
    ]


def _red(judged: Mapping[str, Any]) -> bool:
    return judged["fate"] == "caught" and Verdict(judged["verdict"]).colour == "red" and bool(judged["reason"])


@pytest.mark.parametrize(
    "spoiled", [{"fate": "same"}, {"verdict": "match"}, {"reason": ""}], ids=lambda spoiled: next(iter(spoiled))
)
def test_caught_is_what_was_red_for_a_reason(spoiled: Mapping[str, str]) -> None:
    sound, other = to_dict(ON_CPU), to_dict(ON_CPU)
    other["mutants"][0]["verdicts"][0]["workloads"]["edge"].update(spoiled)

    assert unproven(sound) == []
    assert unproven(other) == [f"{ONE.id}, cpu small"]


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_kept_page_follows_from_its_data(folder: str) -> None:
    kept = read(KEPT / folder, TABLE, CHECKS)

    assert (KEPT / folder / "mutants.md").read_text() == to_page(kept), STALE[folder]
    assert {row.run.device for row in kept.rows} == {FOLDERS[folder]}, "each device has a folder of its own"


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_kept_report_names_the_verdicts_on_other_references_and_adapters_than_todays(folder: str) -> None:
    kept = read(KEPT / folder, TABLE, CHECKS)

    assert kept.outdated == aged(kept, Parts(published(), Sources()).of).outdated, STALE[folder]


def test_what_a_cpu_can_show_is_of_today() -> None:
    kept = read(KEPT, TABLE, CHECKS)

    assert kept.outdated == kept.waiting == (), "stale: nox -s mutants"


def test_a_verdict_on_another_reference_or_adapter_is_named_and_one_under_another_tolerance_is_told() -> None:
    today = Parts(published(), Sources())
    row = replace(ON_CPU.rows[0], parts=today.of(ONE, "cpu", "small"))
    other = {name: replace(row, parts={**row.parts, name: "0"}) for name in report_parts.PARTS}

    def told(*rows: Row) -> Report:
        return aged(replace(ON_CPU, rows=rows), today.of)

    assert told(row).outdated == ()
    assert [name for name, each in other.items() if told(each).outdated] == ["reference", "adapter"]
    found = told(*other.values())
    assert found.older == dict.fromkeys(report_parts.PARTS, 1)
    assert "1 verdicts are of another tolerance than today's" in found.summary
    named = f"Judged with another reference or adapter than today's: {escaped(f'{ONE.id} (cpu small)')}."
    assert named in to_page(told(other["adapter"]))
    assert f"Not judged as they stand today: {escaped(TWO.id)}." in to_page(replace(ON_CPU, waiting=(TWO.id,)))


def test_parts_tell_one_place_device_and_size_from_another() -> None:
    today, other = Parts(published(), Sources()), next(each for each in TABLE if each.op_type != ONE.op_type)
    told = today.of(ONE, "cpu", "small")

    def changed(mutant: Mutant, device: str, size: Size) -> tuple[str, ...]:
        return differing(told, today.of(mutant, device, size))

    assert changed(ONE, "cuda", "small") == ("tolerance",)
    assert changed(ONE, "cpu", "medium") == ("workloads",)
    assert set(changed(other, "cpu", "small")) >= {"reference", "adapter", "definition", "workloads", "tolerance"}


def test_what_is_written_reads_back_equal_and_has_one_line_a_mutant(tmp_path: Path) -> None:
    page, file = write_files(ON_CPU, tmp_path)

    lines = [json.loads(line.removesuffix(",")) for line in file.read_text().splitlines() if line.startswith('  {"id"')]
    assert json.loads(file.read_text()) == to_dict(ON_CPU)
    assert read(tmp_path, TABLE, CHECKS) == ON_CPU
    assert file.read_text() == to_json(to_dict(read(tmp_path, TABLE, CHECKS))), "a diff would show what did not change"
    assert [line["id"] for line in lines] == [ONE.id, TWO.id, GPU.id]
    assert "- 2026-11-21 on cpu, sizes small: python 3." in page.read_text()
    assert "no mutant was held to this: gemm\\_n1 m1, torch: crash" in page.read_text()


def test_the_page_sums_up_each_device_in_a_line_of_its_own(tmp_path: Path) -> None:
    page, _ = write_files(merged(ON_CPU, report(CUDA, {GPU.id: CAUGHT}), TABLE), tmp_path)

    assert {"- cpu small: 2 caught.", "- cuda small: 1 caught."} <= set(page.read_text().splitlines())


def test_a_report_without_mutants_is_json_too() -> None:
    data = to_dict(Report((), (), CHECKS))

    assert json.loads(to_json(data)) == data


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_a_kept_report_is_as_the_command_writes_it(folder: str) -> None:
    kept = (KEPT / folder / "mutants.json").read_text()

    assert kept == to_json(json.loads(kept))
    assert kept == to_json(to_dict(read(KEPT / folder, TABLE, CHECKS)))


def test_a_run_on_a_gpu_stands_beside_what_a_cpu_has_shown(tmp_path: Path) -> None:
    write_files(ON_CPU, tmp_path)

    page, _ = keep(report(CUDA, {TWO.id: replace(CAUGHT, verdict="crash"), GPU.id: CAUGHT}), tmp_path, TABLE, parts)

    found = {row.key: row for row in read(tmp_path, TABLE, CHECKS).rows}
    assert list(found) == [
        (ONE.id, "cpu", "small"),
        (TWO.id, "cpu", "small"),
        (TWO.id, "cuda", "small"),
        (GPU.id, "cuda", "small"),
    ]
    assert [found[each.key] for each in ON_CPU.rows] == list(ON_CPU.rows)
    assert found[TWO.id, "cuda", "small"].judged[0]["verdict"] == "crash"
    assert read(tmp_path, TABLE, CHECKS).elsewhere == ()
    assert "- 2026-11-22 on cuda, sizes small, medium: gpu NVIDIA H200, python 3." in page.read_text()
    assert "| planted in | cpu small | cuda small |" in page.read_text()
    assert "| caught: 1 error | caught: 1 crash |" in page.read_text()


def test_a_later_run_on_a_cpu_keeps_what_a_gpu_has_shown() -> None:
    on_gpu = report(CUDA, {GPU.id: CAUGHT})

    found = merged(on_gpu, ON_CPU, TABLE)

    assert [row.mutant.id for row in found.rows] == [ONE.id, TWO.id, GPU.id]
    assert found.rows[2] == on_gpu.rows[0]
    assert found.elsewhere == ()


def test_a_mutant_of_the_table_that_nobody_has_judged_is_told() -> None:
    found = merged(ON_CPU, report(CPU, {}), TABLE[:3])

    assert found.waiting == (TABLE[2].id,)
    assert found.summary[-1] == f"1 not judged as they stand today, such as {TABLE[2].id!r}"


def test_a_mutant_that_could_not_run_keeps_the_verdict_that_it_had() -> None:
    again = merged(ON_CPU, report(CPU, {ONE.id: ABSENT, GPU.id: ABSENT}), TABLE)

    assert {row.mutant.id: row.fate for row in again.rows} == {ONE.id: "caught", TWO.id: "caught", GPU.id: "not-run"}
    assert again.rows[0] == ON_CPU.rows[0]


def test_what_could_not_run_is_tried_again_and_so_is_what_another_environment_has_judged() -> None:
    some = merged(ON_CPU, report(CPU, {GPU.id: ABSENT}), TABLE)

    assert settled(some, "cpu", CPU.environment, parts) == {(ONE.id, "small"), (TWO.id, "small")}
    assert settled(some, "cuda", CPU.environment, parts) == set()
    assert settled(some, "cpu", {"python": "4"}, parts) == set()


@pytest.mark.parametrize(
    ("small", "medium", "failed"),
    [
        pytest.param("caught", "survived", 0, id="caught at small"),
        pytest.param("survived", "caught", 1, id="not at small"),
        pytest.param("not-run", "survived", 1, id="at medium alone"),
        pytest.param("not-run", "same", 1, id="unmoved at medium alone"),
        pytest.param("same", "caught", 1, id="unmoved at small"),
    ],
)
def test_a_mutant_has_to_be_caught_at_the_smallest_size_at_which_it_runs(small: str, medium: str, failed: int) -> None:
    (row,) = report(CPU, {ONE.id: CAUGHT}).rows
    judged = [(plain(replace(CAUGHT, fate=cast(Fate, fate))),) for fate in (small, medium)]
    found = Report(
        tuple(replace(row, size=size, judged=one) for size, one in zip(SIZES, judged, strict=False)), (), CHECKS
    )

    assert len(found.failed) == found.exit_code == failed


@pytest.mark.parametrize(
    ("size", "fate", "told"),
    [
        ("small", "same", "survived"),
        ("small", "rounding", "survived"),
        ("medium", "same", "unmoved"),
        ("medium", "rounding", "unmoved"),
        ("medium", "survived", "survived"),
    ],
)
def test_what_moves_nothing_has_survived_at_the_smallest_size_alone(size: Size, fate: Fate, told: str) -> None:
    (row,) = report(CPU, {ONE.id: CAUGHT}).rows
    found = replace(row, size=size, judged=(plain(replace(CAUGHT, fate=fate)),))

    assert found.fate == told
    assert Column("cpu", size, (found,), ()).held == (told == "survived")


def test_evidence_of_another_fault_is_not_kept(tmp_path: Path) -> None:
    write_files(ON_CPU, tmp_path)
    changed = ONE.model_copy(update={"broken": "0"})

    kept = read(tmp_path, [changed, TWO], CHECKS)

    assert [row.mutant.id for row in kept.rows] == [TWO.id]
    assert kept.elsewhere == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": [], "mutants": [{"id": 1}]}'])
def test_a_file_that_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mutants.json").write_text(text)

    with pytest.raises(MutantError, match="is no report that this version can add to"):
        keep(ON_CPU, tmp_path, TABLE, parts)


def test_what_is_red_for_the_sound_code_is_counted_once_a_workload_and_proves_nothing() -> None:
    task, source = Task("", ONE.where, "edge", (ONE,), "cpu", ""), ONE.where.source
    red = {source: {"document 1": True, "documents 2 and 3": False}}
    told = [(task, Told({ONE.id: CAUGHT}, red, {(source, "numerics"): "crash: x", (None, "determinism"): "error: y"}))]

    assert false_alarms(told, CHECKS[:2]) == {"document 1": (1, 1), "documents 2 and 3": (0, 1)}
    (row,) = rows([ONE], told, {}, CPU)
    assert not row.fixed["document 1"]
    place = f"{ONE.where.definition} edge"
    assert unsound(told) == (f"{place}, determinism: error: y", f"{place}, {source}: crash: x")

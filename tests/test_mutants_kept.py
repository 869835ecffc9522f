"""The files that keep what became of mutants: what is written reads back, and a run changes what it judged alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from guards import ROOT, published, table

from refgrid.dataset.case import SIZES, Size
from refgrid.mutants import report as report_parts
from refgrid.mutants.baseline import CHECKS
from refgrid.mutants.judging import Fate, Judgement
from refgrid.mutants.kept import aged, keep, merged, read, settled, to_dict, to_json, write_files
from refgrid.mutants.parts import Parts
from refgrid.mutants.report import Report, Row, Run, differing, false_alarms, plain, rows, unsound
from refgrid.mutants.running import Task, Told
from refgrid.mutants.table import Mutant, MutantError
from refgrid.sources import Sources

KEPT = ROOT / "results" / "mutants"
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


def test_the_kept_report_is_of_these_mutants_and_none_survived() -> None:
    kept = json.loads((KEPT / "mutants.json").read_text())
    known = {one["id"]: one["digest"] for one in (*kept["mutants"], *kept["elsewhere"])}

    assert known == {mutant.id: mutant.digest for mutant in table().values()}, "stale: nox -s mutants"
    assert kept["exit_code"] == 0


def of_another(rows: Sequence[Row], today: Parts) -> list[str]:
    """Verdicts on code that is no longer there: of another text of the reference, or another adapter."""
    found = [(row, differing(row.parts, today.of(row.mutant, *row.column))) for row in rows]
    return [f"{row.mutant.id}, {' '.join(row.column)}: {', '.join(names)}" for row, names in found if decides(names)]


def decides(names: Sequence[str]) -> bool:
    return not set(names).isdisjoint(report_parts.DECIDING)


def test_the_kept_verdicts_are_about_todays_references_and_adapters() -> None:
    assert of_another(read(KEPT, TABLE, CHECKS).rows, Parts(published(), Sources())) == [], "stale: nox -s mutants"


def test_a_verdict_on_another_reference_or_adapter_is_stale_and_one_under_another_tolerance_is_told() -> None:
    today = Parts(published(), Sources())
    row = replace(ON_CPU.rows[0], parts=today.of(ONE, "cpu", "small"))
    other = {name: replace(row, parts={**row.parts, name: "0"}) for name in report_parts.PARTS}

    assert of_another([row], today) == []
    assert [name for name, each in other.items() if of_another([each], today)] == ["reference", "adapter"]
    found = aged(replace(ON_CPU, rows=tuple(other.values())), today.of)
    assert found.older == dict.fromkeys(report_parts.PARTS, 1)
    assert "1 verdicts are of another tolerance than today's" in found.summary


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


def test_the_kept_report_is_as_the_command_writes_it() -> None:
    kept = (KEPT / "mutants.json").read_text()

    assert kept == to_json(json.loads(kept))
    assert kept == to_json(to_dict(read(KEPT, TABLE, CHECKS)))


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
    ],
)
def test_a_mutant_has_to_be_caught_at_the_smallest_size_at_which_it_runs(small: str, medium: str, failed: int) -> None:
    (row,) = report(CPU, {ONE.id: CAUGHT}).rows
    judged = [(plain(replace(CAUGHT, fate=cast(Fate, fate))),) for fate in (small, medium)]
    found = Report(
        tuple(replace(row, size=size, judged=one) for size, one in zip(SIZES, judged, strict=False)), (), CHECKS
    )

    assert len(found.failed) == found.exit_code == failed


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

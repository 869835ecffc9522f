"""The files that keep what became of mutants: what is written reads back, and a run changes what it judged alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from guards import ROOT, table

from refgrid.mutants.baseline import CHECKS
from refgrid.mutants.judging import Judgement
from refgrid.mutants.kept import keep, merged, read, to_dict, to_json, write_files
from refgrid.mutants.report import Report, Run, false_alarms, rows, unsound
from refgrid.mutants.running import Task, Told
from refgrid.mutants.table import Mutant, MutantError

TABLE = list(table().values())
ONE, TWO, GPU = TABLE[0], TABLE[1], next(mutant for mutant in TABLE if mutant.device == "cuda")
ALARMS = dict.fromkeys(CHECKS, (1, 2))
CPU = Run("cpu", ("small",), {"python": "3"}, ALARMS, ("gemm_n1 m1, torch: crash: killed by SIGSEGV",))
CUDA = Run("cuda", ("small", "medium"), {"gpu": "NVIDIA H200", "python": "3"}, ALARMS)
CAUGHT = Judgement("edge", "caught", "mismatch", "torch", "a line\nand another", 0.5, {"document 1": True})
ABSENT = Judgement("edge", "not-run", reason="missing")


def report(run: Run, found: Mapping[str, Judgement], elsewhere: Sequence[Mutant] = ()) -> Report:
    here = [mutant for mutant in TABLE if mutant.id in found]
    told = [
        (Task("", mutant.where, "edge", (mutant,), run.device, ""), Told({mutant.id: found[mutant.id]}, alarms))
        for mutant in here
        for alarms in [{mutant.where.source: {"document 1": False}}]
    ]
    return Report(rows(here, told, {}, run), tuple(elsewhere), CHECKS)


ON_CPU = report(CPU, {ONE.id: CAUGHT, TWO.id: replace(CAUGHT, verdict="error")}, [GPU])


def test_the_kept_report_is_of_these_mutants_and_none_survived() -> None:
    kept = json.loads((ROOT / "results" / "mutants" / "mutants.json").read_text())
    known = {one["id"]: one["digest"] for one in (*kept["mutants"], *kept["elsewhere"])}

    assert known == {mutant.id: mutant.digest for mutant in table().values()}, "stale: nox -s mutants"
    assert kept["exit_code"] == 0


def test_what_is_written_reads_back_equal_and_has_one_line_a_mutant(tmp_path: Path) -> None:
    page, file = write_files(ON_CPU, tmp_path)

    lines = [json.loads(line.removesuffix(",")) for line in file.read_text().splitlines() if line.startswith('  {"id"')]
    assert json.loads(file.read_text()) == to_dict(ON_CPU)
    assert read(tmp_path, TABLE, CHECKS) == ON_CPU
    assert file.read_text() == to_json(to_dict(read(tmp_path, TABLE, CHECKS))), "a diff would show what did not change"
    assert [line["id"] for line in lines] == [ONE.id, TWO.id, GPU.id]
    assert "- On cpu, sizes small: python 3." in page.read_text()
    assert "no mutant was held to this: gemm\\_n1 m1, torch: crash" in page.read_text()


def test_a_report_without_mutants_is_json_too() -> None:
    data = to_dict(Report((), (), CHECKS))

    assert json.loads(to_json(data)) == data


def test_the_kept_report_is_as_the_command_writes_it() -> None:
    kept = (ROOT / "results" / "mutants" / "mutants.json").read_text()

    assert kept == to_json(json.loads(kept))
    assert kept == to_json(to_dict(read(ROOT / "results" / "mutants", TABLE, CHECKS)))


def test_a_run_on_a_gpu_adds_and_replaces_what_it_judged_and_keeps_the_rest(tmp_path: Path) -> None:
    write_files(ON_CPU, tmp_path)

    page, _ = keep(report(CUDA, {TWO.id: replace(CAUGHT, verdict="crash"), GPU.id: CAUGHT}), tmp_path, TABLE)

    found = {row.mutant.id: row for row in read(tmp_path, TABLE, CHECKS).rows}
    assert found[ONE.id] == ON_CPU.rows[0]
    assert {name: row.run.device for name, row in found.items()} == {ONE.id: "cpu", TWO.id: "cuda", GPU.id: "cuda"}
    assert found[TWO.id].judged[0]["verdict"] == "crash"
    assert read(tmp_path, TABLE, CHECKS).elsewhere == ()
    assert "- On cuda, sizes small, medium: gpu NVIDIA H200, python 3." in page.read_text()
    assert "| cuda | caught | 1 crash |" in page.read_text()


def test_a_later_run_on_a_cpu_keeps_what_a_gpu_has_shown() -> None:
    on_gpu = report(CUDA, {GPU.id: CAUGHT})

    found = merged(on_gpu, ON_CPU, TABLE)

    assert [row.mutant.id for row in found.rows] == [ONE.id, TWO.id, GPU.id]
    assert found.rows[2] == on_gpu.rows[0]
    assert found.elsewhere == ()


def test_a_mutant_that_could_not_run_keeps_the_verdict_that_it_had() -> None:
    again = merged(ON_CPU, report(CUDA, {ONE.id: ABSENT, GPU.id: ABSENT}), TABLE)

    assert {row.mutant.id: row.fate for row in again.rows} == {ONE.id: "caught", TWO.id: "caught", GPU.id: "not-run"}
    assert again.rows[0] == ON_CPU.rows[0]


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
        keep(ON_CPU, tmp_path, TABLE)


def test_what_is_red_for_the_sound_code_is_counted_once_a_workload_and_proves_nothing() -> None:
    task, source = Task("", ONE.where, "edge", (ONE,), "cpu", ""), ONE.where.source
    red = {source: {"document 1": True, "documents 2 and 3": False}}
    told = [(task, Told({ONE.id: CAUGHT}, red, {(source, "numerics"): "crash: x", (None, "determinism"): "error: y"}))]

    assert false_alarms(told, CHECKS[:2]) == {"document 1": (1, 1), "documents 2 and 3": (0, 1)}
    (row,) = rows([ONE], told, {}, CPU)
    assert not row.fixed["document 1"]
    place = f"{ONE.where.definition} edge"
    assert unsound(told) == (f"{place}, determinism: error: y", f"{place}, {source}: crash: x")

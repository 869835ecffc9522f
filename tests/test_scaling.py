"""`refgrid scaling`: the same cases on more and more GPUs, here on fake ones, whose cases sleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from fleet import Fleet
from test_record import CASES, header

from refgrid.cli import main
from refgrid.records.ledger import Ledger, claim
from refgrid.records.record import Outcome, Verdict, read_runs
from refgrid.report.scaling import Timing

ROOT = Path(__file__).resolve().parents[1]
FIELDS = [
    *("gpus", "workers", "cores", "run", "started", "cases", "verdicts", "worker_seconds", "longest_workloads"),
    *("command", "environment", "seconds", "rate", "efficiency"),
]


def run(fleet: Fleet, *arguments: str) -> subprocess.CompletedProcess[str]:
    own = ["--no-audit", "--lease-folder", str(fleet.root / "leases"), "--environment", "fake"]
    command = [sys.executable, "-m", "refgrid", "scaling", *arguments, *own]
    variables = {**os.environ, **fleet.variables, "COLUMNS": "120"}
    return subprocess.run(command, cwd=fleet.root, env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def fleet(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Fleet:
    made = Fleet(tmp_path, double, write_definition)
    made.reference("import planted\nreturn planted.used(x)", 1, 2)
    return made


def test_the_same_cases_run_on_each_number_of_gpus(fleet: Fleet) -> None:
    done = run(fleet, "--gpus", "1,2", "--output", "told.json")

    assert done.returncode == 0, done.stdout + done.stderr
    one, two = json.loads((fleet.root / "told.json").read_text())
    assert list(one) == [*FIELDS[:-2], "start", *FIELDS[-2:], "busy"]
    assert (one["gpus"], one["workers"], two["gpus"], two["workers"]) == (1, 1, 2, 2)
    assert one["cases"] == two["cases"] > 0
    assert one["verdicts"] == two["verdicts"]
    assert one["run"] != two["run"]
    assert {"inputs", "reference", "truth", "compare"} <= set(one["worker_seconds"])
    assert set(one["longest_workloads"]) == {"double_n4-b1", "double_n4-b2"}
    assert one["command"].startswith("pytest ")
    assert one["cores"] == len(os.sched_getaffinity(0))
    assert {use.device for use in fleet.uses} == {"FAKE-0", "FAKE-1"}
    assert not list((fleet.root / "results").rglob("*.jsonl"))  # a timing is no evidence


def test_a_red_case_makes_the_time_mean_nothing(fleet: Fleet) -> None:
    fleet.reference("return x * 3", 1)

    done = run(fleet, "--gpus", "1")

    assert done.returncode == 1
    assert "there are red cases (mismatch), so the time means nothing" in done.stdout


def test_more_gpus_than_there_are_is_refused_before_anything_runs(fleet: Fleet) -> None:
    done = run(fleet, "--gpus", "1,4")

    assert done.returncode == 2
    assert "--gpus asks for 4, but visible are fake GPU FAKE-0" in done.stderr
    assert not (fleet.root / "used.log").exists()


@pytest.mark.parametrize("text", ["", "0", "two", "1,,2"])
def test_numbers_of_gpus_that_are_none_are_refused(fleet: Fleet, text: str) -> None:
    done = run(fleet, "--gpus", text)

    assert done.returncode == 2
    assert "should be numbers of GPUs such as 1,2,4" in done.stderr


def test_more_cores_than_there_are_is_refused(fleet: Fleet) -> None:
    done = run(fleet, "--gpus", "1", "--cores-per-gpu", "100000")

    assert done.returncode == 2
    assert "--cores-per-gpu asks for 100000 cores in all, but there are" in done.stderr


def test_efficiency_is_the_growth_in_rate_over_the_growth_in_gpus() -> None:
    one = Timing(1, 1, None, "a", "2026", 100, {}, {}, {}, "pytest", {}, 80.0, None)
    four = replace(one, gpus=4, workers=4, seconds=25.0)

    assert four.efficiency(one) == pytest.approx(0.8)
    assert one.efficiency(one) == 1


Record = Callable[..., Path]


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """The folder of a run of three matches on so many GPUs, as --results leaves it; its last record came after 50 s."""

    def write(gpus: int, command: str = "pytest -n auto --workers-per-gpu 5", **wrong: Any) -> Path:
        folder = tmp_path / f"on{gpus}"
        ledger = Ledger(folder / "run.jsonl", replace(header(f"run{gpus}"), command=command))
        for number, case in enumerate(CASES):
            device = "" if wrong.get("device") == "cpu" else f"NVIDIA H200 GPU-{number % gpus}"
            spent = {"inputs": 1.0 + number, "truth": 10.0}
            ledger.close_case(Outcome(case, wrong.get("verdict", Verdict.MATCH), "told", seconds=spent, device=device))
        ledger.finish("")
        (run,) = read_runs(folder)
        if wrong.get("resumed"):
            file = claim(ledger.path)
            assert file
            Ledger.resumed(run, file).finish("")
        if wrong.get("killed"):
            ledger.path.write_text("".join(ledger.path.read_text().splitlines(keepends=True)[:-1]))
        os.utime(ledger.path, (wrong.get("written", 1_795_154_450),) * 2)
        return folder

    return write


def read(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["scaling", *map(str, arguments)])


def test_finished_runs_are_read_and_not_run_again(tmp_path: Path, record: Record) -> None:
    told = ["--from", f"{record(1)}=40.5", "--from", record(3, "pytest -n 6"), "--beside", "a compiler", "--beside", ""]

    done = read(*told, "--cores-per-gpu", 16, "--output", tmp_path / "told.json")

    assert done.exit_code == 0, done.output
    one, three = json.loads((tmp_path / "told.json").read_text())
    assert list(one) == [*FIELDS, "busy", "beside"]
    assert [name for name in three if name != "seconds_are"] == [*FIELDS, "busy"]
    assert (one["gpus"], one["workers"], one["cores"], one["run"], one["seconds"]) == (1, 5, 16, "run1", 40.5)
    assert (three["gpus"], three["workers"], three["cores"], three["run"]) == (3, 6, 48, "run3")
    assert (three["seconds"], three["seconds_are"]) == (50, "from the plan to the last record")
    assert one["worker_seconds"] == {"truth": 30.0, "inputs": 6.0}
    assert one["longest_workloads"] == {"double_n4-b3": 13.0, "double_n4-b2": 12.0, "double_n4-b1": 11.0}
    assert one["environment"] == {"name": "cpu", "gpu": None, "driver": None, "torch": "2.13.0", "cuda": None}
    assert (one["rate"], one["busy"], one["beside"]) == (0.1, 0.18, "a compiler")
    assert three["efficiency"] == 0.27


def test_the_committed_timings_have_the_fields_that_the_command_writes() -> None:
    for file in (ROOT / "results" / "scaling").glob("*.json"):
        for told in json.loads(file.read_text()):
            assert [name for name in told if name not in {"start", "busy", "beside"}] == FIELDS


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        pytest.param({"verdict": Verdict.MISMATCH}, "there are red cases (mismatch)", id="red"),
        pytest.param({"verdict": Verdict.CACHED}, "3 cases are cached, so the time means nothing", id="cached"),
        pytest.param({"device": "cpu"}, "no case of it ran on a GPU", id="no GPU"),
        pytest.param({"killed": True}, "its run has not ended", id="killed"),
        pytest.param({"resumed": True}, "its run was killed and went on later", id="resumed"),
        pytest.param({"written": 1}, "how long its run took is to be told: FOLDER=SECONDS", id="copied"),
    ],
)
def test_a_finished_run_whose_time_means_nothing_is_refused(record: Record, wrong: Any, told: str) -> None:
    done = read("--from", record(1, **wrong))

    assert done.exit_code != 0
    assert told in " ".join(done.output.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["--from", "nowhere"], "'nowhere' should be a folder of records, or FOLDER=SECONDS", id="none"),
        pytest.param(["--from", ".=0"], "'.=0' should be a folder of records, or FOLDER=SECONDS", id="no time"),
        pytest.param(["--from", "."], "holds 0 runs, but should hold one", id="empty"),
        pytest.param(["--from", ".", "tests"], "--from runs nothing, so tests has no meaning", id="with arguments"),
        pytest.param(["--gpus", "1,2,4", "--beside", "a", "--beside", "b"], "--beside is given 2 times", id="notes"),
    ],
)
def test_what_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)

    done = read(*arguments)

    assert done.exit_code == 2
    assert told in done.output

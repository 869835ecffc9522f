"""`refgrid scaling`: the same cases on more and more GPUs, here on fake ones, whose cases sleep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet

from refgrid.commands.scaling import Timing


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
    one, two = json.loads((fleet.root / "told.json").read_text())["runs"]
    assert (one["gpus"], one["workers"], two["gpus"], two["workers"]) == (1, 1, 2, 2)
    assert one["cases"] == two["cases"] > 0
    assert one["verdicts"] == two["verdicts"]
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
    one, four = (Timing(gpus, gpus, 100, seconds, 0.0, 1.0, {}) for gpus, seconds in ((1, 80.0), (4, 25.0)))

    assert four.efficiency(one) == pytest.approx(0.8)
    assert one.efficiency(one) == 1

"""`--budget`: how a duration is written, and what a run does when its time is spent."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from refgrid.records.record import read_runs
from refgrid.running.budget import parse_duration, told_duration

TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"
"""
# Time stands still until a case has run, and is over then.
CLOCK = """
from pathlib import Path
from types import SimpleNamespace
from refgrid.running import budget

budget.time = SimpleNamespace(monotonic=lambda: 1e9 if (Path(__file__).parent / "spent").exists() else 0.0)
"""
SPENDING = "import pathlib, torch\n\ndef run(x):\n    pathlib.Path('spent').touch()\n    return x * 2\n"


@pytest.mark.parametrize(
    ("text", "seconds"), [("20m", 1200), ("1h30m", 5400), ("90s", 90), ("1h", 3600), (" 1h0m5s ", 3605)]
)
def test_a_duration_is_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds
    assert parse_duration(told_duration(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "20", "m20", "20 minutes", "-5m", "0s", "1.5h", "30m1h"])
def test_what_is_no_duration_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(ValueError, match="should be written as 20m, 1h30m or 90s"):
        parse_duration(text)


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture
def project(tmp_path: Path, double: dict[str, Any], write_definition: Any) -> Path:
    (tmp_path / "test_double.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CLOCK)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    write_definition({**double, "reference": SPENDING}, 1, 2, 3)
    return tmp_path


def ended(project: Path) -> Counter[str]:
    """Verdicts of the only run; every planned case has one, and what was not run says why."""
    (ran,) = read_runs(project / "results")
    assert ran.finished
    assert len(ran.outcomes) == len(ran.header.planned) == 12
    reasons = {outcome.reason for outcome in ran.outcomes.values() if outcome.verdict.value == "not-run"}
    assert reasons == {"the budget of 1h30m was spent"}
    return Counter(outcome.verdict.value for outcome in ran.outcomes.values())


def test_when_time_is_spent_the_running_case_ends_normally_and_the_rest_is_not_run(project: Path) -> None:
    done = run(project, "--budget", "1h30m")

    assert ended(project) == {"match": 1, "not-run": 11}
    assert done.returncode == 0, done.stdout


def test_workers_stop_at_the_same_time(project: Path) -> None:
    done = run(project, "--budget", "1h30m", "-n2", "--dist=load")

    assert ended(project)["match"] >= 1
    assert done.returncode == 0, done.stdout


def test_the_next_run_goes_on_where_time_was_spent(project: Path) -> None:
    run(project, "--budget", "1h30m")
    (project / "conftest.py").unlink()

    done = run(project)

    (ran,) = read_runs(project / "results")  # both parts are one run
    verdicts = Counter(outcome.verdict.value for outcome in ran.outcomes.values())
    assert verdicts["not-run"] == 0
    assert verdicts.total() == 12
    assert "which had 1 of 12 cases" in done.stdout


def test_a_run_with_time_left_runs_all(project: Path) -> None:
    (project / "conftest.py").unlink()

    run(project, "--budget", "24h")

    (ran,) = read_runs(project / "results")
    assert "not-run" not in {outcome.verdict.value for outcome in ran.outcomes.values()}


def test_a_budget_that_is_no_duration_is_refused(project: Path) -> None:
    done = run(project, "--budget", "soon")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--budget 'soon' is no duration; it should be written as 20m" in done.stderr

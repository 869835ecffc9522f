"""Tolerances given by hand: recorded, and refused where they loosen without a reason."""

from __future__ import annotations

import pytest
from projects import TESTS, Project

from refgrid.records.record import Verdict


def test_a_tolerance_by_hand_is_recorded_as_such(project: Project) -> None:
    project.reference("return x * 2.1", 1)

    project.run("--tolerance", "1", "--reason", "to look at it")

    outcome = project.outcome("b1-sum")
    assert outcome.verdict is Verdict.MATCH
    assert outcome.reason == "tolerance set to 1 by hand: to look at it"
    assert outcome.comparisons[0]["atol"] == 1


def test_a_mismatch_under_a_tolerance_by_hand_carries_its_reason_too(project: Project) -> None:
    project.reference("return x + 100", 1)

    project.run("--tolerance", "1", "--reason", "to look at it")

    assert project.outcome("b1-sum").verdict is Verdict.MISMATCH
    assert project.outcome("b1-sum").reason.endswith("tolerance set to 1 by hand: to look at it")
    assert "by hand" not in project.outcome("b1-absent").reason


def test_a_tolerance_that_loosens_without_a_reason_is_refused_with_the_numbers(project: Project) -> None:
    done = project.run("--tolerance", "1e-3")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    told = (
        "--tolerance 0.001 is looser than the source documents' table: float32 has atol 1e-05, rtol 1e-05 (double_n4.y)"
    )
    assert told in done.stderr + done.stdout
    assert "add --reason TEXT" in done.stderr + done.stdout
    assert not (project.root / "results").exists()


def test_a_tolerance_that_loosens_without_a_reason_is_refused_in_workers_too(project: Project) -> None:
    done = project.run("--tolerance", "1e-3", "-n", "2", "--dist", "load", "--max-worker-restart", "1000")

    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert "--tolerance 0.001 is looser than the source documents' table" in done.stdout
    assert not (project.root / "results").exists()


def write_coarse(project: Project) -> None:
    """A second definition: bfloat16, which allows more than the float32 of the first."""
    kind = {"shape": ["batch_size", "n"], "dtype": "bfloat16"}
    changes = {"name": "coarse_n4", "inputs": {"x": kind}, "outputs": {"y": kind}}
    project.write_definition({**project.definition, **changes}, 1)
    tests = TESTS.replace("TestDoubleN4", "TestCoarse").replace("double_n4", "coarse_n4")
    (project.root / "test_coarse.py").write_text(tests)


@pytest.mark.parametrize(
    ("chosen", "bound", "told"),
    [
        pytest.param(["test_coarse.py"], "1e-3", "", id="tighter than a file's"),
        pytest.param(["-k", "Coarse"], "1e-3", "", id="tighter than those of -k"),
        pytest.param(["test_coarse.py"], "0.5", "bfloat16 has atol 0.008, rtol 0.01 (coarse_n4.y); add", id="looser"),
    ],
)
def test_a_tolerance_is_held_against_what_runs_and_nothing_else(
    project: Project, chosen: list[str], bound: str, told: str
) -> None:
    write_coarse(project)

    done = project.run("--tolerance", bound, *chosen)

    assert done.returncode == (pytest.ExitCode.USAGE_ERROR if told else pytest.ExitCode.OK)
    assert told in done.stderr + done.stdout
    assert "float32 has" not in done.stderr + done.stdout


def test_a_tighter_tolerance_needs_no_reason(project: Project) -> None:
    project.run("--tolerance", "1e-6")

    assert project.outcome("b1-sum").reason == "tolerance set to 1e-06 by hand"


def test_a_reason_without_a_tolerance_is_refused(project: Project) -> None:
    done = project.run("--reason", "for nothing")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--reason is that of --tolerance" in done.stderr + done.stdout


def test_a_class_that_loosens_without_a_reason_is_refused(project: Project) -> None:
    (project.root / "test_double.py").write_text(TESTS + "    tolerance = 1.0\n")

    done = project.run()

    assert done.returncode != 0
    assert "TestDoubleN4.tolerance 1 is looser than the source documents' table" in done.stderr + done.stdout


def test_a_class_may_set_its_sizes_and_tolerance(project: Project) -> None:
    project.reference("return x * 2.1", 1, 2**18)
    own = '    test_sizes = ("small",)\n    tolerance = 1.0\n    tolerance_reason = "made up"\n'
    (project.root / "test_double.py").write_text(TESTS + own)

    project.run()

    assert {outcome.case.workload for outcome in project.records().accounted()} == {"b1"}
    assert project.outcome("b1-sum").verdict is Verdict.MATCH
    assert "tolerance set to 1 by hand: made up" in project.outcome("b1-sum").reason

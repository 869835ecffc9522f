"""The pytest plugin, run for real in pytest processes of its own: verdicts, records, and the account of them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest
from projects import TESTS, TRUTH, Project

from refgrid.dataset.case import Case
from refgrid.records.record import Verdict, read_runs
from refgrid.running.replay import replay_command


def test_a_right_reference_matches_and_an_absent_library_is_no_pass(project: Project) -> None:
    done = project.run("--definition-name", "double_n4")

    assert done.returncode == 0, done.stdout
    assert project.verdicts() == {
        f"b{size}-{check}": verdict
        for size in (1, 2)
        for check, verdict in {
            "shape": "match",
            "dtype": "match",
            "sum": "match",
            "absent": "missing",
            "agreement": "missing",
            "determinism": "match",
        }.items()
    }
    assert "planned 12 = accounted 12: 4 missing, 8 match" in done.stdout
    assert project.records().finished


def test_a_match_carries_its_numbers(project: Project) -> None:
    project.run()

    outcome = project.outcome("b2-sum")

    (comparison,) = outcome.comparisons
    assert comparison["output"] == "y"
    assert comparison["max_abs_error"] == 0
    assert {"inputs", "reference", "source", "truth", "compare"} >= set(outcome.seconds) >= {"truth", "compare"}
    parts = {"definition", "reference", "adapter", "workload", "expected", "tolerance"}
    assert set(outcome.hashes) == {"inputs", "key", *parts}


class Fault(NamedTuple):
    """Bodies of a reference and of its truth, and what must be said of them."""

    reference: str
    truth: str
    verdict: str
    reason: str
    name: str


FAULTS = [
    Fault("return x * 2.1", TRUTH, "mismatch", "y is off at [", "wrong_scale"),
    Fault("return x.roll(1, 1) * 2", TRUTH, "mismatch", "y is off at [", "shifted"),
    Fault("y = x * 2\ny[0, 1] = float('nan')\nreturn y", TRUTH, "mismatch", "y is nan at [0, 1]", "nan"),
    Fault(
        "return x * 2",
        "y = x + x\ny[0, 1] = float('nan')\nreturn {'y': y}",
        "mismatch",
        "but should be nan",
        "nan_in_the_truth",
    ),
    Fault("y = x * 2\ny[0, 1] = float('inf')\nreturn y", TRUTH, "mismatch", "y is inf at [0, 1]", "inf"),
    Fault(
        "return x * 2",
        "y = x + x\ny[0, 1] = float('inf')\nreturn {'y': y}",
        "mismatch",
        "but should be inf",
        "inf_in_the_truth",
    ),
    Fault(
        "return x * 2 + float('inf')",
        "return {'y': x - float('inf')}",
        "mismatch",
        "y is inf at [0, 0] but should be -inf",
        "inf_of_the_other_sign",
    ),
    Fault("return x[:0] * 2", TRUTH, "error", "y.shape = [0, 4], but should be [1, 4]", "empty"),
    Fault("return x * 2", "return {'y': x[:0]}", "error", "sum: y.shape = [0, 4], but should be [1, 4]", "empty_truth"),
    Fault("return x.T * 2", TRUTH, "error", "y.shape = [4, 1], but should be [1, 4]", "transposed"),
    Fault("return x[0] * 2", TRUTH, "error", "y.shape = [4], but should be [1, 4]", "rank"),
    Fault("return (x * 2).sum()", TRUTH, "error", "y.shape = [], but should be [1, 4]", "scalar"),
    Fault("return x.double() * 2", TRUTH, "error", "y.dtype = float64, but should be float32", "dtype"),
    Fault("return x, x", TRUTH, "error", "the outputs are ['y']", "two_outputs"),
    Fault("return x.mul_(2)", TRUTH, "error", "reference changed its input x", "input_overwritten"),
    Fault("return x * 2", "return {'y': x.mul_(2)}", "error", "sum changed its input x", "truth_overwrites"),
    Fault("return x * 2", "return {'z': x}", "error", "sum gives ['z']", "other_output"),
    Fault("return x * 2", "return {}", "error", "sum gives []", "no_output"),
    Fault("return x * 2", "return {'y': x[:, :1]}", "error", "sum: y.shape = [1, 1]", "shape_of_the_truth"),
    Fault("raise KeyError('k')", TRUTH, "error", "KeyError: 'k'", "exception"),
    Fault("raise MemoryError('4 GiB')", TRUTH, "oom", "4 GiB", "out_of_memory"),
    Fault("return x * 2", "raise MemoryError('4 GiB')", "oom", "4 GiB", "truth_out_of_memory"),
    Fault(
        "return x * 2", "raise Unavailable('match', 'all is well')", "error", "Unavailable", "truth_that_claims_a_match"
    ),
    Fault("return x * 2", "import no_such", "error", "ModuleNotFoundError", "import_error"),
]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, pristine_double: dict[str, Any], writer_below: Any) -> Project:
    """One run over a definition for each fault; torch is imported once."""
    root = tmp_path_factory.mktemp("faults")
    project = Project(root, pristine_double, writer_below(root))
    (root / "test_double.py").write_text(TESTS.replace('"double_n4"', "None"))
    for fault in FAULTS:
        project.reference(fault.reference, 1, name=f"{fault.name}_n4")
    project.truth(**{fault.name: fault.truth for fault in FAULTS})
    project.run()
    return project


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_is_named_as_what_it_is(faulty: Project, fault: Fault) -> None:
    outcome = faulty.records().outcomes[f"{fault.name}_n4-b1-sum"]

    assert outcome.verdict.value == fault.verdict
    assert fault.reason in outcome.reason


def test_a_workload_without_elements_proves_nothing(project: Project) -> None:
    project.reference("return x * 2", 0)

    project.run()

    assert project.outcome("b0-sum").verdict is Verdict.ERROR
    assert "y has no element (shape [0, 4]): nothing was compared" in project.outcome("b0-sum").reason


def test_a_failure_is_reported_where_it_is_read_with_the_command_that_replays_it(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")  # pytest's summary is not cut to the width of a terminal then
    project.reference("return x * 2.1")

    done = project.run("--seed", "3", "-k", "b2-sum")

    first = project.outcome("b2-sum-seed3")
    explained, replay = "explained by a factor of 1.05", first.report.splitlines()[-1].removeprefix("replay: ")
    assert first.reason.count("\n") == 0
    assert f"; all of it {explained} [" in first.reason
    assert first.report.startswith("y: ")
    assert all(told in first.report and told in done.stdout for told in (explained, "[batch_size=", replay))
    assert "src/refgrid" not in done.stdout.replace(os.sep, "/")  # nobody mends a reference there
    assert "[double_n4-b2-sum-seed3] - mismatch: y is off at " in done.stdout

    (project.root / "results").rename(project.root / "before")
    program, *arguments = shlex.split(replay)
    again = project.run(*arguments)

    assert program == "pytest"
    assert "planned 1 = accounted 1: 1 mismatch" in again.stdout
    again_outcome = project.outcome("b2-sum-seed3")
    assert again_outcome.hashes["inputs"] == first.hashes["inputs"]
    assert again_outcome.comparisons == first.comparisons


def test_what_did_not_fail_has_no_report(project: Project) -> None:
    project.run()

    assert {outcome.report for outcome in project.records().accounted()} == {""}


def test_in_an_environment_of_this_checkout_its_session_replays_a_case(pytestconfig: pytest.Config) -> None:
    root = pytestconfig.rootpath
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "numerics", "torch", "small", seed=3)
    test = "tests/references/test_rmsnorm.py::TestRmsnormH128::test_numerical_correctness[rmsnorm_h128-b4-torch-seed3]"
    options = {"--environment": "cpu", "--seeds": 9, "--tolerance": 0.5, "--reason": "to see it", "--memory": 2.0**31}
    config = cast(pytest.Config, SimpleNamespace(getoption=options.get, rootpath=root))

    session, _, told = replay_command(config, test, case, "cpu").partition(" -- ")
    arguments = shlex.split(told)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--device", "cpu", *arguments]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    assert session == "nox -s tests-cpu"
    assert arguments == [
        test,
        *["--test-sizes", "small", "--tolerance", "0.5", "--reason", "to see it"],
        *["--seed", "3", "--seeds", "1", "--memory", "2147483648"],
    ]
    assert [line for line in found.stdout.splitlines() if "::" in line] == [test]


def test_a_reference_that_changes_its_mind_is_nondeterministic(project: Project) -> None:
    project.reference("run.calls = getattr(run, 'calls', 0) + 1\nreturn x * 2 + (run.calls - 1) * 1e-7", 1)

    project.run()

    assert project.outcome("b1-determinism").verdict is Verdict.NONDETERMINISTIC
    assert "differs between two runs" in project.outcome("b1-determinism").reason


def test_sources_that_disagree_are_a_mismatch_of_agreement(project: Project) -> None:
    provider = (project.root / "provider.py").read_text()
    (project.root / "provider.py").write_text(
        provider.replace('raise Unavailable("missing", "absent is not installed")', 'return lambda x: {"y": x * 3}')
    )

    project.run()

    assert project.outcome("b1-sum").verdict is Verdict.MATCH
    assert project.outcome("b1-agreement").verdict is Verdict.MISMATCH
    assert "absent against sum" in project.outcome("b1-agreement").reason


def test_a_results_folder_that_cannot_be_written_is_an_error_before_the_first_case(project: Project) -> None:
    (project.root / "taken").write_text("a file where the folder should be")

    done = project.run("--results", "taken")

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "records cannot be written" in done.stderr + done.stdout
    assert "passed" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["--op-type", "gemm"], "legal values: double", id="op_type"),
        pytest.param(["--definition-name", "double_n5"], "'double_n5' is not known; near it: double_n4", id="near"),
        pytest.param(["--definition-name", "x"], "legal values: double_n4", id="definition"),
        pytest.param(["--test-sizes", "small,tiny"], "legal values: small, medium, large", id="size"),
        pytest.param(["--checks", "numerics,sums"], "'sums' is not known; legal values: definition, shape", id="check"),
        pytest.param(["--tolerance", "-1"], "a finite number >= 0", id="tolerance"),
        pytest.param(["--memory", "lots"], "should be such as 2GiB, 512MiB or 1000000", id="memory"),
        pytest.param(["--device", "tpu"], "choose from", id="device"),
        pytest.param(["--dataset", "nowhere"], "no such folder", id="dataset"),
    ],
)
def test_a_wrong_option_names_the_legal_values(project: Project, arguments: list[str], told: str) -> None:
    done = project.run(*arguments)

    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert told in done.stderr + done.stdout


def test_broken_definitions_are_one_error_row_each(project: Project) -> None:
    project.write_definition("{", name="broken")
    (project.root / "test_rest.py").write_text(TESTS.replace("TestDoubleN4", "TestRest").replace('"double_n4"', "None"))

    done = project.run()

    outcomes = {outcome.case.id: outcome for outcome in project.records().accounted()}
    assert done.returncode == 1
    assert outcomes["broken-definition"].verdict is Verdict.ERROR
    assert "broken.json: file: Invalid JSON" in outcomes["broken-definition"].reason
    assert [o.verdict for o in outcomes.values()].count(Verdict.ERROR) == 1
    assert len(outcomes) == 13


def test_a_foreign_data_set_runs_under_the_same_contract(project: Project, tmp_path_factory: Any) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "test_dataset.py").write_text(TESTS.replace('"double_n4"', "None"))
    (home / "test_own.py").write_text(TESTS.replace("double_n4", "own_n1"))
    command = project.command("--dataset", str(project.root), "--results", str(home / "results"))

    done = subprocess.run(command, cwd=home, env=project.variables, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout
    (run,) = read_runs(home / "results")
    assert {outcome.case.definition for outcome in run.accounted()} == {"double_n4"}


def test_cases_of_one_workload_stand_together(project: Project) -> None:
    done = project.run("--collect-only", "-q")

    workloads = [line.split("-")[1] for line in done.stdout.splitlines() if "::" in line]
    assert workloads == ["b1"] * 6 + ["b2"] * 6


def test_collecting_imports_no_torch(project: Project) -> None:
    (project.root / "conftest.py").write_text(
        "import sys\n\ndef pytest_collection_finish():\n    assert 'torch' not in sys.modules, 'torch was imported'\n"
    )

    assert project.run("--collect-only", "-q").returncode == 0


def test_the_check_for_torch_would_notice(project: Project) -> None:
    (project.root / "conftest.py").write_text(
        "import sys, torch\n\ndef pytest_collection_finish():\n    assert 'torch' not in sys.modules, 'imported'\n"
    )

    assert project.run("--collect-only", "-q").returncode != 0


def test_progress_replaces_the_letters(project: Project) -> None:
    done = project.run("--progress")

    assert "100%  12 of 12 cases" in done.stderr
    assert "...." not in done.stdout


def test_an_expected_failure_under_a_progress_bar_is_in_the_summary(project: Project) -> None:
    project.reference("return x * 2.1", 1)
    project.expect_mismatch()

    done = project.run("--progress", "-ra", "-k", "b1-sum")

    assert "wrong on purpose (https://example.org)" in done.stdout  # in the summary
    assert "1 xfailed" in done.stdout
    assert done.returncode == 0

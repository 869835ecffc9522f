"""The pytest plugin, run for real in pytest processes of its own: verdicts, records, and the account of them.

The data set is one op, `double`, with a ground truth of our own in a provider installed beside it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import pytest

from refgrid.dataset.case import Case
from refgrid.records.record import Outcome, Run, Verdict, read_runs
from refgrid.running.replay import replay_command

PROVIDER = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    library: str = "torch"
    distribution: str = "torch"
    ops: tuple = {ops}

class Unavailable(Exception):
    def __init__(self, verdict, reason):
        self.verdict, self.reason = verdict, reason

SOURCES = (Source("sum"), Source("absent"))

def adapter(source, op, device):
    if source == "absent":
        raise Unavailable("missing", "absent is not installed")
    return globals()["truth_of_" + op]

{truths}
"""
TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"
"""
TRUTH = 'return {"y": x + x}'


class Project:
    """A checkout with one definition, its test file and a ground-truth provider."""

    def __init__(self, root: Path, definition: dict[str, Any], write_definition: Any) -> None:
        self.root, self.definition, self.write_definition = root, definition, write_definition
        (root / "test_double.py").write_text(TESTS)
        (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
        self.truth(double=TRUTH)

    def reference(self, body: str, *batch_sizes: int, name: str = "double_n4") -> None:
        """The body of `run(x)`; torch is imported."""
        text = "import os, time, torch\n\ndef run(x):\n    " + body.replace("\n", "\n    ") + "\n"
        self.write_definition({**self.definition, "name": name, "reference": text}, *(batch_sizes or (1, 2)))

    def truth(self, **bodies: str) -> None:
        """The body of the ground truth of each op; `x` is its input."""
        truths = [f"def truth_of_{op}(x):\n    " + body.replace("\n", "\n    ") for op, body in bodies.items()]
        provider = PROVIDER.replace("{ops}", repr(tuple(bodies))).replace("{truths}", "\n\n".join(truths))
        (self.root / "provider.py").write_text(provider)
        info = self.root / "provider-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: provider\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[refgrid.sources]\nprovider = provider\n")

    def expect_mismatch(self) -> None:
        """Call a mismatch with the provider a known failure."""
        (self.root / "ci").mkdir()
        (self.root / "ci" / "expected_failures.toml").write_text(
            '[[expected]]\ncases = ["*-sum"]\nenvironments = ["*"]\nverdict = "mismatch"\n'
            'reason = "wrong on purpose"\nlink = "https://example.org"\n'
        )

    def command(self, *arguments: str) -> list[str]:
        without = ["-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:anyio"]  # the last two take long
        return [sys.executable, "-m", "pytest", *without, "--device", "cpu", *arguments]

    @property
    def variables(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), cwd=self.root, env=self.variables, capture_output=True, text=True, check=False
        )

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """A run to interfere with; it listens to Ctrl-C even where the caller was started in the background."""
        process = subprocess.Popen(
            self.command(),
            cwd=self.root,
            env=self.variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)

    def records(self) -> Run:
        (run,) = read_runs(self.root / "results")
        return run

    def verdicts(self) -> dict[str, str]:
        """Verdict by case, without the definition's name."""
        return {o.case.id.removeprefix("double_n4-"): o.verdict.value for o in self.records().accounted()}

    def outcome(self, case: str) -> Outcome:
        return self.records().outcomes[f"double_n4-{case}"]


@pytest.fixture
def project(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Project:
    made = Project(tmp_path, double, write_definition)
    made.reference("return x * 2")
    return made


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


def test_a_worker_that_dies_is_a_crash_and_the_rest_runs(project: Project) -> None:
    project.reference("if x.shape[0] == 2: os._exit(13)\nreturn x * 2", 1, 2, 3)

    done = project.run("-n", "1", "--dist", "load", "--max-worker-restart", "1000")

    verdicts = project.verdicts()
    assert done.returncode == 1
    assert {case for case, verdict in verdicts.items() if verdict == "crash"} == {
        f"b2-{check}" for check in ("shape", "dtype", "sum", "determinism", "absent", "agreement")
    } - {case for case, verdict in verdicts.items() if verdict != "crash"}
    assert [verdicts[f"b{size}-sum"] for size in (1, 2, 3)] == ["match", "crash", "match"]
    assert "crashed" in project.outcome("b2-sum").reason


# Says of each process what it calls at its end, and what happens only when its interpreter is taken apart.
ENDS = """
import __main__, atexit, os
WHO, FLAGS = "controller" if hasattr(__main__, "__file__") else "worker", os.O_CREAT | os.O_WRONLY

class Late:
    def __del__(self, write=os.open, name="taken-apart-" + WHO, flags=FLAGS):
        write(name, flags)

late = Late()
atexit.register(os.open, "said-goodbye-" + WHO, FLAGS)
"""


def test_a_worker_ends_without_taking_its_interpreter_apart(project: Project) -> None:
    """With torch and the libraries that takes seconds, for which the controller waits."""
    (project.root / "conftest.py").write_text(ENDS)

    done = project.run("-n", "1")

    said = {each.name for pattern in ("said-*", "taken-*") for each in project.root.glob(pattern)}
    assert done.returncode == 0, done.stdout
    assert said == {"said-goodbye-worker", "said-goodbye-controller", "taken-apart-controller"}


def test_a_worker_whose_session_fails_ends_as_any_process_does(project: Project) -> None:
    """Its last words and its status are its own."""
    failing = "\ndef pytest_sessionfinish():\n    assert WHO == 'controller'\n"
    (project.root / "conftest.py").write_text(ENDS + failing)

    project.run("-n", "1")

    assert (project.root / "taken-apart-worker").exists()


def test_interrupting_leaves_finished_records_readable_and_the_rest_not_run(project: Project) -> None:
    project.reference("time.sleep(60 if x.shape[0] == 3 else 0)\nreturn x * 2", 1, 3)
    with project.running() as running:
        _wait_for_outcomes(project.root, 6)
        running.send_signal(signal.SIGINT)
        running.wait(30)

    run = project.records()

    assert run.finished
    assert [outcome.case.workload for outcome in run.accounted() if outcome.verdict is Verdict.NOT_RUN] == ["b3"] * 6
    assert {outcome.reason for outcome in run.outcomes.values() if outcome.verdict is Verdict.NOT_RUN} == {
        "the run was interrupted before its turn"
    }


def test_killing_the_run_leaves_what_it_owes_not_run(project: Project) -> None:
    project.reference("time.sleep(60 if x.shape[0] == 3 else 0)\nreturn x * 2", 1, 3)
    with project.running() as running:
        _wait_for_outcomes(project.root, 6)
        running.kill()

    run = project.records()

    assert not run.finished
    assert [outcome.verdict for outcome in run.accounted()].count(Verdict.NOT_RUN) == 6


def test_stopping_at_the_first_failure_accounts_for_the_rest(project: Project) -> None:
    project.reference("return x * 3")

    project.run("-x")

    assert list(project.verdicts().values()).count("not-run") == 12 - 3


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


def _wait_for_outcomes(root: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line for file in (root / "results").rglob("*.jsonl") for line in file.read_text().splitlines()]
        if sum('"outcome"' in line for line in lines) >= count:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{count} outcomes were not recorded in a minute")

"""Runs that end early, by a death, a signal or a limit: what was done is kept, and what is owed is said."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from projects import Project

from refgrid.records.record import Verdict


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


def _wait_for_outcomes(root: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        lines = [line for file in (root / "results").rglob("*.jsonl") for line in file.read_text().splitlines()]
        if sum('"outcome"' in line for line in lines) >= count:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{count} outcomes were not recorded in a minute")

"""A run that was left, killed or interrupted, goes on where it stopped: the records of all its parts are one run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from projects import Project

from refgrid.records.ledger import claim
from refgrid.records.record import INTERRUPTED, Run, Verdict, read_runs

TWO_WORKERS = ("-n", "2", "--dist", "load", "--max-worker-restart", "10")


def waiting(body: str = "return x * 2", recorded: str = "outcome") -> str:
    """A reference that, once the records have such a word, waits until it may go on."""
    return f"""import glob
while not os.path.exists('go') and any('"{recorded}"' in open(f).read() for f in glob.glob('results/local/*.jsonl')):
    open('waits', 'w').close()
    time.sleep(0.05)
{body}"""


@pytest.fixture
def project(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Iterator[Project]:
    made = Project(tmp_path, double, write_definition)
    made.reference(waiting(), 1, 3, 4)
    yield made
    (tmp_path / "go").touch()  # whatever still waits ends


@pytest.fixture(scope="session")
def killed_once(
    pristine_double: dict[str, Any],
    writer_below: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What a run leaves that is killed while its reference waits."""
    root = tmp_path_factory.mktemp("killed")
    made = Project(root, pristine_double, writer_below(root))
    made.reference(waiting(), 1, 3, 4)
    with left(made, signal.SIGKILL):
        return root


@pytest.fixture
def killed(killed_once: Path, project: Project) -> Project:
    """The same, for one test: of how it came about nothing is asked but what stands there."""
    shutil.copytree(killed_once, project.root, dirs_exist_ok=True)
    return project


@contextmanager
def left(project: Project, how: int, *arguments: str) -> Iterator[None]:
    """A run that is ended by a signal while the reference waits; afterwards it need not wait any more."""
    process = subprocess.Popen(
        project.command(*arguments),
        cwd=project.root,
        env=project.variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
    )
    try:
        wait_for((project.root / "waits").exists, "the reference never waited")
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        process.wait(60)
        for child in children if how == signal.SIGKILL else ():
            child.kill()
    finally:
        process.kill()
        process.wait(30)
    (project.root / "go").touch()
    yield


def wait_for(met: Any, otherwise: str) -> None:
    deadline = time.monotonic() + 120
    while not met():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        time.sleep(0.05)


def only_run(project: Project) -> Run:
    (run,) = read_runs(project.root / "results")
    return run


def lines(run: Run, kind: str) -> list[str]:
    return [line for line in run.file.read_text().splitlines() if line.startswith(f'{{"type":"{kind}"')]


@pytest.mark.parametrize("workers", [(), TWO_WORKERS], ids=["one process", "two workers"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_run_that_was_left_goes_on_as_one_run(project: Project, how: int, workers: tuple[str, ...]) -> None:
    with left(project, how, *workers):
        before = only_run(project)

        done = project.run(*workers)

    run = only_run(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.header == before.header
    assert run.finished
    assert (before.finished, before.stopped) == ((True, INTERRUPTED) if how == signal.SIGINT else (False, ""))
    assert Counter(outcome.verdict.value for outcome in run.accounted()) == {"match": 12, "missing": 6}
    kept = {name: each for name, each in before.outcomes.items() if each.verdict is not Verdict.NOT_RUN}
    assert kept
    assert {name: run.outcomes[name] for name in kept} == kept
    ran = [line for line in lines(run, "outcome") if '"not-run"' not in line]
    assert len(ran) == len(run.header.planned) == 18  # no case twice
    assert len(lines(run, "resume")) == 1
    assert "planned 18 = accounted 18: 6 missing, 12 match" in done.stdout
    assert f"went on with run {run.header.run}" in done.stdout


def test_half_a_last_line_is_cut_off_and_its_case_is_run_again(killed: Project) -> None:
    file = only_run(killed).file
    whole = file.read_bytes()
    half = whole[: whole.rstrip(b"\n").rfind(b"\n") + 40]
    file.write_bytes(half)
    assert len(only_run(killed).outcomes) == whole.count(b"\n") - 2

    killed.run()

    assert only_run(killed).finished
    assert Counter(outcome.verdict.value for outcome in only_run(killed).accounted()) == {"match": 12, "missing": 6}
    assert only_run(killed).file.read_bytes().startswith(whole[: whole.rstrip(b"\n").rfind(b"\n") + 1])


def test_a_last_line_that_lacks_but_its_newline_stands_and_is_not_run_again(killed: Project) -> None:
    file = only_run(killed).file
    whole = file.read_bytes()
    file.write_bytes(whole.rstrip(b"\n"))
    assert len(only_run(killed).outcomes) == whole.count(b"\n") - 1

    killed.run()

    assert only_run(killed).finished
    assert Counter(outcome.verdict.value for outcome in only_run(killed).accounted()) == {"match": 12, "missing": 6}
    assert only_run(killed).file.read_bytes().startswith(whole)


def test_a_run_may_be_left_more_than_once(project: Project) -> None:
    with left(project, signal.SIGINT):
        (project.root / "go").unlink()
        (project.root / "waits").unlink()
    with left(project, signal.SIGKILL):
        project.run()

    run = only_run(project)
    assert run.finished
    assert len(lines(run, "resume")) == 2
    assert len([line for line in lines(run, "outcome") if '"not-run"' not in line]) == 18


def changed_reference(project: Project) -> None:
    project.reference(waiting() + "\n", 1, 3, 4)


def changed_truth(project: Project) -> None:
    (project.root / "provider.py").write_text((project.root / "provider.py").read_text() + "# edited\n")


def changed_libraries(project: Project) -> None:
    (project.root / "absent-1.0.dist-info").mkdir()


def changed_tolerance(project: Project) -> None:
    file = project.root / "test_double.py"
    file.write_text(file.read_text() + "    tolerance = 0.5\n    tolerance_reason = 'to see'\n")


def lost_keys(project: Project) -> None:
    (file,) = (project.root / "results").rglob("*.jsonl")
    file.write_text(file.read_text().replace('"parts":{"', '"other":{"'))


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        pytest.param(changed_reference, (), "double_n4-b1-shape: changed since: reference ", id="reference"),
        pytest.param(changed_truth, (), "changed since: adapter ", id="adapter"),
        pytest.param(changed_libraries, (), "changed since: libraries nothing -> absent 1.0", id="libraries"),
        pytest.param(changed_tolerance, (), "changed since: tolerance table -> 0.5", id="tolerance"),
        pytest.param(lost_keys, (), "it has no keys", id="no keys"),
        pytest.param(None, ("--memory", "2GiB"), "changed since: memory all -> 2147483648 B", id="memory"),
        pytest.param(None, ("-k", "b1"), "it planned 18 cases, and this run's 6 are not the same", id="other cases"),
    ],
)
def test_a_run_that_would_not_be_the_same_today_is_left_alone_with_the_reason(
    killed: Project, change: Any, arguments: tuple[str, ...], told: str
) -> None:
    before = only_run(killed)
    text = before.file.read_text()
    if change:
        change(killed)
        text = before.file.read_text()

    done = killed.run(*arguments)

    old, new = sorted(read_runs(killed.root / "results"), key=lambda run: run.header.run != before.header.run)
    assert f"a new run, since the one that was left cannot go on: run {before.header.run} of " in done.stdout
    assert told in done.stdout
    assert before.file.read_text() == text
    assert (old.finished, new.finished) == (False, True)
    assert Verdict.NOT_RUN not in {outcome.verdict for outcome in new.accounted()}


@pytest.mark.parametrize("arguments", [("--no-resume",), ("--environment", "other")], ids=" ".join)
def test_a_new_run_begins_without_a_word_where_none_was_asked_to_go_on(
    killed: Project, arguments: tuple[str, ...]
) -> None:
    done = killed.run(*arguments)

    assert len(read_runs(killed.root / "results")) == 2
    assert "cannot go on" not in done.stdout


def test_a_run_that_is_still_being_written_is_left_alone(killed: Project) -> None:
    file = claim(only_run(killed).file)
    assert file
    done = killed.run("-k", "b1 or b3 or b4")
    file.close()

    assert "another process is still writing it" in done.stdout
    assert len(read_runs(killed.root / "results")) == 2


def test_what_was_red_before_makes_the_whole_run_red(project: Project) -> None:
    project.reference(waiting("return x * (3 if x.shape[0] == 1 else 2)"), 1, 3, 4)
    with left(project, signal.SIGKILL):
        done = project.run()

    assert done.returncode == 1
    assert "planned 18 = accounted 18: 1 mismatch, 6 missing, 11 match" in done.stdout


@pytest.mark.parametrize("workers", [(), TWO_WORKERS], ids=["one process", "two workers"])
def test_a_run_that_stopped_at_a_failure_is_over(project: Project, workers: tuple[str, ...]) -> None:
    project.reference("return x * 3", 1, 3, 4)
    project.run("-x", *workers)
    first = only_run(project)

    project.run(*workers)

    assert first.finished
    assert first.stopped not in {"", INTERRUPTED}
    assert len(read_runs(project.root / "results")) == 2


def test_without_the_cache_a_run_that_took_outcomes_from_another_does_not_go_on(project: Project) -> None:
    (project.root / "go").touch()
    project.run("-k", "b1")
    (project.root / "go").unlink()
    with left(project, signal.SIGKILL):
        done = project.run("--no-cache")

    assert "was not measured by it, which --no-cache asks for" in done.stdout


def test_a_case_that_crashed_keeps_its_verdict(project: Project) -> None:
    crash_once = "if not os.path.exists('crashed'):\n    open('crashed', 'w').close()\n    os._exit(9)\n"
    project.reference(crash_once + waiting(recorded="crash"), 1, 3, 4)
    with left(project, signal.SIGKILL, *TWO_WORKERS):
        before = only_run(project)
        assert Verdict.CRASH in {outcome.verdict for outcome in before.outcomes.values()}

        done = project.run(*TWO_WORKERS)

    assert done.returncode == 1
    assert only_run(project).outcomes.items() >= before.outcomes.items()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.touch()
    program = (
        "import sys, time; from pathlib import Path; from refgrid.records.ledger import claim;"
        "held = claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        assert claim(file) is None
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait(30)

    again = claim(file)
    assert again
    again.close()

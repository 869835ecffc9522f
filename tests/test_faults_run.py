"""Faults of a whole run: Ctrl-C, a full disk, GPUs that others hold, a process without a controller that hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from fleet import CRASH_SAFE, Fleet, overlapping

from refgrid.records.record import Run, Verdict
from refgrid.running.devices import Device
from refgrid.running.lease import Lease, this_process, try_lease

USED = "import planted\nreturn planted.used(x)"
BOTH = [Device(f"FAKE-{i}", "fake GPU", 2**34) for i in range(2)]


@pytest.fixture
def fleet(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Fleet:
    made = Fleet(tmp_path, double, write_definition)
    made.reference(USED, 1, 2, 3)
    return made


def leases(fleet: Fleet) -> list[Lease]:
    """Both GPUs, or those that are free."""
    holder = this_process("the test itself", "noon")
    taken = [try_lease(BOTH, 1, fleet.root / "leases", holder) for _ in BOTH]
    return [lease for lease in taken if lease]


def not_run(run: Run) -> set[str]:
    return {outcome.reason for outcome in run.accounted() if outcome.verdict is Verdict.NOT_RUN}


@pytest.mark.parametrize("whom", ["controller", "group"])
def test_interrupting_a_run_with_workers_accounts_for_the_rest_and_frees_the_gpus(fleet: Fleet, whom: str) -> None:
    fleet.reference("import planted\nif x.shape[0] < 3: time.sleep(600)\nreturn planted.used(x)", 1, 2, 3, 4)
    with fleet.started("-n", "2", *CRASH_SAFE) as run:
        _wait_for(lambda: _outcomes(fleet) >= 12)  # the largest come first: both workers sit in one that does not end
        os.kill(run.pid, signal.SIGINT) if whom == "controller" else os.killpg(run.pid, signal.SIGINT)
        told, _ = run.communicate(timeout=120)

    record = fleet.records()
    assert run.returncode == pytest.ExitCode.INTERRUPTED, told
    assert record.finished
    assert len(record.outcomes) == len(record.header.planned) == 24
    assert not_run(record) == {"the run was interrupted before its turn"}
    assert [o.verdict for o in record.outcomes.values()].count(Verdict.NOT_RUN) == 12
    _wait_for(lambda: len(leases(fleet)) == 2)
    assert fleet.left_behind == []


def test_two_runs_at_once_share_the_gpus_without_sharing_one(fleet: Fleet) -> None:
    fleet.reference("import planted\nreturn planted.used(x, 0.3)", 1, 2, 3, 4)
    options = ("-n", "2", *CRASH_SAFE, "--results")

    with fleet.started(*options, "first") as first, fleet.started(*options, "second") as second:
        told = [run.communicate(timeout=300)[0] for run in (first, second)]

    assert [first.returncode, second.returncode] == [0, 0], told
    assert all("planned 24 = accounted 24" in text for text in told)
    assert {use.device for use in fleet.uses} == {"FAKE-0", "FAKE-1"}
    assert overlapping(fleet.uses) == []


@pytest.mark.parametrize("workers", [("-n", "2"), ()], ids=["workers", "alone"])
def test_gpus_that_another_run_keeps_end_the_wait_with_who_has_them(fleet: Fleet, workers: tuple[str, ...]) -> None:
    taken = leases(fleet)
    assert len(taken) == 2

    done = fleet.run(*workers, *(CRASH_SAFE if workers else ()), "--lease-timeout", "2s")

    assert list((fleet.root / "results").rglob("*.jsonl")), done.stdout + done.stderr
    (reason,) = not_run(fleet.records())
    assert len(fleet.records().outcomes) == 18
    assert reason.startswith("no GPU within 2s (--lease-timeout): "), done.stdout + done.stderr
    assert f"fake GPU FAKE-1: leased by process {os.getpid()} of" in reason
    assert "since noon for the test itself" in reason
    assert "waits for a GPU. Visible are fake GPU FAKE-0 (16.0 GiB)" in done.stdout
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    assert not (fleet.root / "used.log").exists()


def test_a_worker_takes_over_a_gpu_that_comes_free(fleet: Fleet) -> None:
    fleet.reference("import planted\nplanted.meet(2)\nreturn planted.used(x)", 1, 2, 3)
    first, second = leases(fleet)
    first.release()
    with fleet.started("-n", "2", *CRASH_SAFE) as run:
        _wait_for((fleet.root / "used.log").exists)  # one worker waits in its case for the other, which waits for a GPU
        second.release()
        told, _ = run.communicate(timeout=120)

    assert run.returncode == 0, told
    assert {use.device for use in fleet.uses} == {"FAKE-0", "FAKE-1"}


def test_a_run_whose_gpus_are_held_can_still_end_early(fleet: Fleet) -> None:
    fleet.reference("import planted\nplanted.used(x)\nreturn x * 3")
    held = leases(fleet)
    held[0].release()

    done = fleet.run("-n", "2", *CRASH_SAFE, "-x")  # the worker that waits for the other GPU is let go

    assert done.returncode == pytest.ExitCode.INTERRUPTED
    assert not_run(fleet.records()) == {"the run stopped before its turn, as -x or --maxfail asks"}


def test_torch_that_was_imported_too_early_is_refused(fleet: Fleet) -> None:
    (fleet.root / "conftest.py").write_text("import torch\n")

    done = fleet.run()

    (reason,) = not_run(fleet.records())
    assert reason.startswith("torch was imported before a GPU was leased")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


@pytest.mark.parametrize(
    ("visible", "told"),
    [
        pytest.param("7", "CUDA_VISIBLE_DEVICES='7': '7' is no GPU of this machine", id="index"),
        pytest.param("", "no GPU is visible", id="none"),
    ],
)
def test_gpus_that_are_not_there_are_said(fleet: Fleet, visible: str, told: str) -> None:
    fleet.settings["CUDA_VISIBLE_DEVICES"] = visible

    done = fleet.run()

    (reason,) = not_run(fleet.records())
    assert told in reason
    assert done.returncode == pytest.ExitCode.TESTS_FAILED


LAGGING = """import os, time

def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ: time.sleep(0.05)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit is Linux's")
@pytest.mark.parametrize("workers", [("-n", "1"), ()], ids=["worker", "alone"])
def test_a_disk_that_fills_up_in_the_middle_ends_the_run_and_says_so(fleet: Fleet, workers: tuple[str, ...]) -> None:
    """As large as they are now is as large as files may be from now on, for the process that writes the records.

    It may lag behind the worker, and does here: the six cases of the first workload must be on the disk before.
    """
    whose = "os.getppid()" if workers else "os.getpid()"
    full = f"""import glob, resource
if x.shape[0] == 2:
    written, = glob.glob("results/**/*.jsonl", recursive=True)
    while open(written).read().count('"type":"outcome"') < 6: time.sleep(0.01)
    size = os.path.getsize(written)
    resource.prlimit({whose}, resource.RLIMIT_FSIZE, (size, size))
{USED}"""
    fleet.reference(full, 1, 2, 3)
    (fleet.root / "conftest.py").write_text(LAGGING)

    done = fleet.run(*workers, *(CRASH_SAFE if workers else ()))

    demand_written_before_it_was_full(fleet, done, "File too large", workers)


# Who is no worker of this run writes its records; the environment tells of the run that these tests are in, too.
FULL = """import os, pytest

def pytest_configure(config):
    global writes
    writes = not hasattr(config, "workerinput")

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    if "-b2-" in report.nodeid and writes:
        opened = {os.path.realpath(f"/proc/self/fd/{number}"): int(number) for number in os.listdir("/proc/self/fd")}
        for name, number in opened.items():
            if name.endswith(".jsonl"):
                os.dup2(os.open("/dev/full", os.O_WRONLY), number)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
@pytest.mark.parametrize("workers", [("-n", "1"), ()], ids=["worker", "alone"])
def test_a_disk_without_space_ends_the_run_and_says_so(fleet: Fleet, workers: tuple[str, ...]) -> None:
    """Before the first outcome of the second workload reaches its file, that becomes one on which nothing has room."""
    (fleet.root / "conftest.py").write_text(FULL)

    done = fleet.run(*workers, *(CRASH_SAFE if workers else ()))

    demand_written_before_it_was_full(fleet, done, "No space left on device", workers)


def demand_written_before_it_was_full(
    fleet: Fleet, done: subprocess.CompletedProcess[str], why: str, workers: tuple[str, ...]
) -> None:
    """A run is interrupted, says why, and has kept the first workload that it had written of b1, b2 and b3."""
    run = fleet.records()
    told: dict[str, set[str]] = defaultdict(set)
    for outcome in run.accounted():
        told[outcome.case.workload].add(outcome.verdict.value)
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout
    assert "records are incomplete: " in done.stdout
    assert f"a record cannot be written: {why}" in done.stdout
    assert not run.finished
    first, last = ("b3", "b1") if workers else ("b1", "b3")
    assert told == {first: {"match", "missing"}, "b2": {"not-run"}, last: {"not-run"}}


def test_a_lone_process_that_hangs_names_the_case_and_the_run_goes_on_behind_it(fleet: Fleet) -> None:
    once = (
        "import planted\nif x.shape[0] == 2 and planted.once('slow'):\n    while True: time.sleep(0.01)\nreturn x * 2"
    )
    fleet.reference(once, 1, 2, 3)

    done = fleet.run("--case-timeout", "30s")

    told = "not done within 30s (--case-timeout), then in run at <reference of double_n4>:6 on fake GPU FAKE-0 [worker"
    assert done.returncode == 1
    assert f"double_n4-b2-shape: hang: {told}" in done.stderr
    assert "\nreplay: pytest 'test_double.py::" in done.stderr
    assert "Timeout (0:00:30)!" in done.stderr
    assert 'File "<reference of double_n4>", line 6 in run' in done.stderr
    assert [path.name for path in fleet.left_behind[0].glob("*.journal")] == ["main.journal"]
    (guilty,) = [o for o in fleet.records().outcomes.values() if o.verdict.colour == "red"]
    assert (guilty.case.id, guilty.verdict) == ("double_n4-b2-shape", Verdict.HANG)
    assert guilty.reason.startswith(told)

    again = fleet.run("--case-timeout", "30s")

    run = fleet.records()  # of both parts
    assert "went on with run" in again.stdout
    assert again.returncode == pytest.ExitCode.TESTS_FAILED
    assert len(run.outcomes) == len(run.header.planned)
    assert [o for o in run.outcomes.values() if o.verdict.colour == "red"] == [guilty]
    assert not_run(run) == set()


def test_a_lone_process_that_hangs_where_no_thread_can_run_names_the_case_all_the_same(fleet: Fleet) -> None:
    """`PyDLL` keeps Python's lock while it calls."""
    fleet.reference("import ctypes\nif x.shape[0] == 2: ctypes.PyDLL(None).pause()\nreturn x * 2", 1, 2, 3)

    done = fleet.run("--case-timeout", "30s")

    assert done.returncode == 1
    assert "Timeout (0:00:40)!" in done.stderr
    assert 'File "<case double_n4-b2-shape>", line ' in done.stderr
    assert not_run(fleet.records()) == {"the run ended before its turn"}


def test_a_lone_process_whose_context_is_lost_stops(fleet: Fleet) -> None:
    (fleet.root / "conftest.py").write_text(
        "from refgrid.running import worker\n\nworker.cuda_fault = lambda: 'CUDA error'\n"
    )

    done = fleet.run()

    run = fleet.records()
    assert [o.verdict.value for o in run.accounted()] == ["crash"] + ["not-run"] * 17
    assert {reason.split(";")[0] for reason in not_run(run)} == {
        f"{run.header.planned[0].id} broke the CUDA context of the only process"
    }
    assert done.returncode == pytest.ExitCode.INTERRUPTED


def _outcomes(fleet: Fleet) -> int:
    files = (fleet.root / "results").rglob("*.jsonl")
    return sum(line.startswith('{"type":"outcome"') for file in files for line in file.read_text().splitlines())


def _wait_for(what: Any) -> None:
    ends = time.monotonic() + 120
    while not what():
        if time.monotonic() > ends:
            raise TimeoutError("what was waited for did not happen in two minutes")
        time.sleep(0.1)


STILLBORN = """import os, signal
import planted

def pytest_collection():
    if "PYTEST_XDIST_WORKER" in os.environ and {condition}:
        os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_workers_that_die_before_they_have_collected_are_not_replaced_for_ever(fleet: Fleet) -> None:
    (fleet.root / "conftest.py").write_text(STILLBORN.format(condition=True))

    done = fleet.run("-n", "2", *CRASH_SAFE)

    assert done.returncode == pytest.ExitCode.INTERNAL_ERROR
    assert re.search(
        r"3 workers in a row died before they had collected the cases; gw\d killed by SIGSEGV",
        done.stdout + done.stderr,
    )
    assert not list((fleet.root / "results").rglob("*.jsonl"))  # nothing was planned


def test_a_worker_that_dies_once_before_it_has_collected_is_replaced(fleet: Fleet) -> None:
    (fleet.root / "conftest.py").write_text(STILLBORN.format(condition='planted.once("died")'))

    done = fleet.run("-n", "2", *CRASH_SAFE)

    assert (fleet.root / "died.once").exists()
    assert not_run(fleet.records()) == set()
    assert "in a row" not in done.stdout + done.stderr


def test_journals_of_a_killed_run_go_with_the_next_one(fleet: Fleet) -> None:
    fleet.reference("import planted\nif planted.once('slow'): time.sleep(600)\nreturn planted.used(x)", 1, 2)
    with fleet.started("-n", "1", *CRASH_SAFE) as run:
        _wait_for((fleet.root / "slow.once").exists)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    assert len(fleet.left_behind) == 1

    fleet.run("-n", "1", *CRASH_SAFE)

    assert fleet.left_behind == []
    assert not_run(fleet.records()) == set()

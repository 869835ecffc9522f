"""Faults that a run survives, each made to happen in one real run with workers on fake GPUs.

Each definition has one fault, which strikes once; whatever else there is must have its own true result.
"""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fleet import CRASH_SAFE, Fleet, overlapping

from refgrid.records.record import Outcome

TRUTH = 'return {"y": x + x}'


class Fault(NamedTuple):
    """What a reference does the first time it is called, and what must be said of the case in which it does."""

    name: str
    strike: str
    verdict: str
    told: tuple[str, ...]


FAULTS = [
    Fault("killed", "os.kill(os.getpid(), 9)", "crash", ("the worker crashed: killed by SIGKILL",)),
    Fault(
        "segfault",
        "import ctypes; ctypes.string_at(0)",
        "crash",
        ("killed by SIGSEGV in string_at at", "ctypes"),
    ),
    Fault("exits", "os._exit(13)", "crash", ("the worker crashed: ended with status 13",)),
    Fault(
        "endless",
        "\n    while True: pass",
        "hang",
        ("not done within 40s (--case-timeout), then in run at <reference of endless_n4>:",),
    ),
    Fault("too_large", "return torch.empty(10**14)", "oom", ("can't allocate memory: you tried to allocate",)),
    Fault(
        "poison",
        "open(f'{planted.FOLDER}/poisoned-{os.getpid()}', 'w').close(); raise RuntimeError('CUDA error: seen late')",
        "crash",
        ("the CUDA context is lost after it: CUDA error: an illegal memory access", "seen late"),
    ),
]
NAMES = [fault.name for fault in FAULTS]

# What a GPU would say of a poisoned process, for the worker's own probe.
CONFTEST = """
import os
from pathlib import Path
from refgrid.running import worker

def cuda_fault():
    poisoned = (Path(__file__).parent / f"poisoned-{os.getpid()}").exists()
    return "CUDA error: an illegal memory access was encountered" if poisoned else ""

worker.cuda_fault = cuda_fault
"""


class Done(NamedTuple):
    fleet: Fleet
    process: subprocess.CompletedProcess[str]
    outcomes: dict[str, Outcome]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, pristine_double: dict[str, Any], writer_below: Any) -> Done:
    root = tmp_path_factory.mktemp("faults")
    fleet = Fleet(root, pristine_double, writer_below(root))
    (root / "conftest.py").write_text(CONFTEST)
    for fault in FAULTS:
        body = f"import planted\nif planted.once('{fault.name}'): {fault.strike}\nreturn planted.used(x)"
        fleet.reference(body, 1, 2, name=f"{fault.name}_n4")
    fleet.meet_at_last(2)
    libraries = {"cut": _library(root, "cut", 1000), "empty": _library(root, "empty", 0), "flipped": _flipped(root)}
    for name in libraries:
        fleet.reference("import planted\nreturn planted.used(x)", 1, name=f"{name}_n4")
    loading = {name: f"import ctypes; ctypes.CDLL({str(path)!r})\n{TRUTH}" for name, path in libraries.items()}
    fleet.truth(**dict.fromkeys(NAMES, TRUTH), **loading)
    fleet.settings["FLASHINFER_WORKSPACE_BASE"] = str(root / "kernels")
    process = fleet.run("-n", "2", *CRASH_SAFE, "--case-timeout", "40s")
    return Done(fleet, process, dict(fleet.records().outcomes))


def _library(root: Path, name: str, size: int | None) -> Path:
    """The first bytes of a library, which is what a compiler leaves that was killed while it wrote; None: all of it."""
    found = importlib.util.find_spec("pydantic_core._pydantic_core")
    assert found
    assert found.origin
    path = root / "kernels" / "cached_ops" / f"{name}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Path(found.origin).read_bytes()[:size])
    return path


def _flipped(root: Path) -> Path:
    """A whole library, one of whose bytes says that it is of 32 bits."""
    path = _library(root, "flipped", None)
    text = bytearray(path.read_bytes())
    text[4] ^= 3
    path.write_bytes(text)
    return path


@pytest.mark.parametrize("fault", FAULTS, ids=NAMES)
def test_the_guilty_case_is_named_with_its_verdict(done: Done, fault: Fault) -> None:
    of_fault = [o for o in done.outcomes.values() if o.case.definition == f"{fault.name}_n4"]
    (guilty,) = [outcome for outcome in of_fault if outcome.verdict.value not in {"match", "missing"}]

    assert guilty.case.check == "shape"  # the first of a workload, which calls the reference
    assert guilty.verdict.value == fault.verdict
    assert all(told in guilty.reason for told in fault.told), guilty.reason
    assert guilty.device.startswith("fake GPU FAKE-")
    assert guilty.report.splitlines()[-1].startswith("replay: pytest 'test_double.py::")


def test_every_other_case_has_its_own_true_result(done: Done) -> None:
    found = {o.case.id: o.verdict.value for o in done.outcomes.values() if o.case.definition[:-3] in NAMES}
    guilty = {name for name, verdict in found.items() if verdict in {"crash", "hang", "oom"}}
    absent = {name for name in found if name.endswith(("-absent", "-agreement"))}

    assert len(guilty) == len(FAULTS)
    assert {name for name, verdict in found.items() if verdict == "missing"} == absent
    assert {name for name, verdict in found.items() if verdict == "match"} == set(found) - absent - guilty


@pytest.mark.parametrize(
    ("name", "verdict", "told"),
    [
        pytest.param("cut", "crash", "killed by SIGBUS in __init__ at", id="that kills whoever loads it"),
        pytest.param("empty", "error", "OSError: ", id="that the loader refuses"),
        pytest.param("flipped", "error", "wrong ELF class: ELFCLASS32", id="one byte of which is wrong"),
    ],
)
def test_a_corrupt_library_is_named_by_the_cases_that_need_it(done: Done, name: str, verdict: str, told: str) -> None:
    found = {o.case.id.removeprefix(f"{name}_n4-b1-"): o for o in done.outcomes.values() if f"{name}_n4" in o.case.id}

    assert {case: outcome.verdict.value for case, outcome in found.items()} == {
        **dict.fromkeys(["shape", "dtype", "determinism"], "match"),
        **dict.fromkeys(["sum", "agreement"], verdict),
        "absent": "missing",
    }
    assert told in found["sum"].reason
    assert f"kernels/cached_ops/{name}.so" in found["sum"].reason


def test_planned_is_accounted_and_nobody_is_blamed_twice(done: Done) -> None:
    planned = 12 * len(FAULTS) + 3 * 6
    run = done.fleet.records()

    assert run.finished
    assert len(run.header.planned) == len(run.outcomes) == planned
    assert f"planned {planned} = accounted {planned}" in done.process.stdout
    assert f"{len(FAULTS) + 6} failed" in done.process.stdout
    assert done.process.returncode == pytest.ExitCode.TESTS_FAILED


def test_each_gpu_is_used_after_all_faults_too_and_none_by_two_at_once(done: Done) -> None:
    assert overlapping(done.fleet.uses) == []
    # By outcomes: a guilty case may be all that a GPU had before the others were done, and it leaves no use.
    assert {outcome.device for outcome in done.outcomes.values()} == {"fake GPU FAKE-0", "fake GPU FAKE-1"}
    assert set(done.fleet.met) == {"FAKE-0", "FAKE-1"}, "a GPU that lost its worker stayed idle"
    assert len(done.fleet.struck) == len(FAULTS)
    assert max(done.fleet.struck) <= max(done.fleet.met.values())


def test_no_journal_is_left_behind(done: Done) -> None:
    assert done.fleet.left_behind == []

"""A data set on fake GPUs, whose references say when they ran on which device; shared by the tests of real runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from projects import TESTS, Project

CRASH_SAFE = ("--dist", "load", "--max-worker-restart", "10000")

# Imported by references and truths; a process of its own each time, so a file is what they share.
PLANTED = '''
import glob, json, os, time

FOLDER = os.path.dirname(__file__)
LOG = os.path.join(FOLDER, "used.log")

def device():
    return os.environ.get("CUDA_VISIBLE_DEVICES", "none")

def used(x, seconds=0.02):
    """Double x; note since when and until when on which device."""
    began = time.time()
    time.sleep(seconds)
    note = {"device": device(), "pid": os.getpid(), "began": began, "ended": time.time(), "batch": x.shape[0]}
    _append(note)
    return x * 2

def meet(devices, processes=1, seconds=300):
    """Wait until so many devices, each with so many processes, have come here; after one wait in vain, not again."""
    _append({"met": device(), "pid": os.getpid(), "at": time.time()})
    ends = time.monotonic() + seconds
    while True:
        with open(LOG) as log:
            came = {(note["met"], note["pid"]) for note in map(json.loads, log) if "met" in note}
        if len({name for name, _ in came}) >= devices and len(came) >= devices * processes:
            return
        if time.monotonic() > ends or os.path.exists(os.path.join(FOLDER, "in-vain.once")):
            once("in-vain")
            raise TimeoutError(f"not all came: {came}")
        time.sleep(0.05)

def once(name):
    """True the first time on this data set, whichever process asks."""
    try:
        os.close(os.open(os.path.join(FOLDER, name + ".once"), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True

def _append(note):
    file = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (json.dumps(note) + "\\n").encode())
    os.close(file)
'''

# No cases: they come last, and no limit of time ends them. Of so many a worker cannot hold all while it waits in one.
MEETING = """
import planted, pytest

@pytest.mark.parametrize("turn", range({turns}))
def test_every_gpu_is_still_in_use(turn):
    planted.meet({gpus})
"""


class Use(NamedTuple):
    """One call of a reference."""

    device: str
    pid: int
    began: float
    ended: float
    batch: int


class Fleet(Project):
    """A project whose cases run under leases of fake GPUs."""

    def __init__(self, root: Path, definition: dict[str, Any], write_definition: Any, gpus: str = "2") -> None:
        super().__init__(root, definition, write_definition)
        self.settings = {"REFGRID_FAKE_GPUS": gpus}
        (root / "planted.py").write_text(PLANTED)
        (root / "test_double.py").write_text(TESTS.replace('"double_n4"', "None"))

    def command(self, *arguments: str) -> list[str]:
        given = [*super().command("--no-audit"), "--lease-folder", str(self.root / "leases"), *arguments]
        given[given.index("--device") + 1] = "cuda"
        return given

    @property
    def variables(self) -> dict[str, str]:
        return {**super().variables, **self.settings}

    def meet_at_last(self, gpus: int) -> None:
        """Let a run go on until a worker of each GPU has come, after all cases were handed out."""
        (self.root / "test_meeting.py").write_text(MEETING.format(turns=8 * gpus, gpus=gpus))

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A run in a group of its own, to be looked at while it goes on; it ends with the block."""
        run = subprocess.Popen(
            self.command(*arguments),
            cwd=self.root,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - no threads here
        )
        try:
            yield run
        finally:
            with suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)
            run.communicate(timeout=60)

    @property
    def uses(self) -> list[Use]:
        """Every call of a reference that has ended."""
        notes = map(json.loads, (self.root / "used.log").read_text().splitlines())
        return [Use(**note) for note in notes if "device" in note]

    @property
    def met(self) -> dict[str, float]:
        """When a worker came to a meeting for the first time, by device."""
        notes = [json.loads(line) for line in (self.root / "used.log").read_text().splitlines()]
        return {note["met"]: note["at"] for note in reversed(notes) if "met" in note}

    @property
    def struck(self) -> list[float]:
        """When that happened which happens once."""
        return [file.stat().st_mtime for file in self.root.glob("*.once")]

    @property
    def left_behind(self) -> list[Path]:
        """Journals that no run has taken away."""
        return list((self.root / "results").rglob(".running-*"))


def overlapping(uses: list[Use]) -> list[tuple[Use, Use]]:
    """Pairs of uses of one device by two processes at once."""
    ordered = sorted(uses, key=lambda use: use.began)
    return [
        (one, other)
        for i, one in enumerate(ordered)
        for other in ordered[i + 1 :]
        if one.device == other.device and one.pid != other.pid and other.began < one.ended
    ]

"""How many compilers run at once, whatever number of builds is under way: each build takes what is free.

Ninja takes part in GNU make's jobserver since 1.13: a pipe with a token for each further compiler. An older ninja gets
all compilers for itself, and builds go one after the other.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
from packaging.version import Version

_JOBSERVER = Version("1.13")
_A_COMPILER = 4 * 2**30  # bytes of memory that a large kernel takes to compile
_OTHERS = 2 * 2**30  # bytes that are left to the rest of the machine
_LIMIT = Path("/sys/fs/cgroup/memory.max")
_USED = Path("/sys/fs/cgroup/memory.current")


def compilers_that_fit() -> int:
    """As many as there are cores, and as the free memory holds; one in any case."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int((_free_memory() - _OTHERS) // _A_COMPILER)))


def ninja_version() -> Version | None:
    """Of the ninja that a library would start; None where there is none."""
    ninja = shutil.which("ninja")
    told = subprocess.run([ninja, "--version"], capture_output=True, text=True, check=False).stdout if ninja else ""
    found = re.match(r"\d+(\.\d+)+", told)
    return Version(found.group()) if found else None


@contextlib.contextmanager
def compiler_slots(count: int, ninja: Version) -> Iterator[contextlib.AbstractContextManager[object]]:
    """What a thread holds while it runs ninja, in whose environment stands how many compilers it may start."""
    before = {name: os.environ.pop(name, None) for name in ("MAKEFLAGS", "MAX_JOBS")}
    try:
        if ninja >= _JOBSERVER:
            with _jobserver(count) as slot:
                yield slot
        else:
            os.environ["MAX_JOBS"] = str(count)
            yield threading.Lock()
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _jobserver(count: int) -> Iterator[_Token]:
    with tempfile.TemporaryDirectory(prefix="refgrid-jobs-") as folder:
        pipe = Path(folder, "tokens")
        os.mkfifo(pipe)
        end = os.open(pipe, os.O_RDWR)  # both ends, so that it never runs dry for want of a reader or a writer
        try:
            os.write(end, b"+" * count)
            os.environ["MAKEFLAGS"] = f" -j{count} --jobserver-auth=fifo:{pipe}"
            yield _Token(end)
        finally:
            os.close(end)


class _Token(contextlib.AbstractContextManager[None]):
    """The first compiler of a ninja, which it starts without a token of its own."""

    def __init__(self, end: int) -> None:
        self._end = end

    def __enter__(self) -> None:
        os.read(self._end, 1)

    def __exit__(self, *_: object) -> None:
        os.write(self._end, b"+")


def _free_memory() -> float:
    """What the machine has, or what the container may still take."""
    free = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # "max" where there is no limit
        free = min(free, float(_LIMIT.read_text()) - float(_USED.read_text()))
    return free

"""Whether what an environment pins can be imported: each module in a process of its own, with a time limit.

A version says only what was unpacked. An import may raise, hang or kill its interpreter, so none happens in this
process. What came of it costs seconds and is kept: it holds until something is installed, or the driver or a path is
another.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.utils import canonicalize_name
from pydantic import TypeAdapter

from refgrid.environments.measured import driver
from refgrid.records import derived
from refgrid.records.derived import Derived, hash_of

SECONDS = 600  # the first import of sglang compiles some thousand modules to bytecode, perhaps on two busy cores
LONGEST = 300
# It ends where the import does: what a library does at its interpreter's end is no part of it.
_PROGRAM = """
import importlib, json, os, sys
sys.path[:] = [place for place in sys.path if place]
told = None
try:
    importlib.import_module(sys.argv[1])
except BaseException as error:
    told = [type(error).__name__, str(error)]
    while (error := error.__cause__ or error.__context__) and len(told) < 20:
        told.append(type(error).__name__ + ": " + str(error))
with open(sys.argv[2], "w") as file:
    json.dump(told, file)
os._exit(0)
"""
# What a library says that finds no driver, often behind a first line of its own.
_NO_DRIVER = re.compile(r"libcuda\.so|libnvidia-ml\.so|no NVIDIA driver", re.IGNORECASE)
_FOLDERS = re.compile(r"(?<![\w:/.])/(?:[\w.+-]+/)+")
_HANGS = "is not done after"
# The variables that say where the dynamic linker and the libraries look, and for which GPU.
_READ = ("LD_LIBRARY_PATH", "LD_PRELOAD", "CUDA_HOME", "CUDA_PATH", "CUDA_VISIBLE_DEVICES")
_FAULTS = TypeAdapter(dict[str, str])
CODE = tuple(Path(each) for each in (__file__, derived.__file__))


class Imports:
    """What imports came to, kept in a folder; `anew`: all are tried, whatever is kept."""

    def __init__(self, folder: Path, *, anew: bool = False) -> None:
        self._kept, self._anew = Derived(folder, "imports", CODE), anew

    def faults(self, environment: str, modules: Sequence[str]) -> dict[str, str]:
        """By module how its import fails, in words."""
        made_of = _state(modules)
        found = None if self._anew else self._kept.read(environment, made_of, _FAULTS.validate_json)
        if found is None:
            found = import_faults(modules)
            if not any(_HANGS in told for told in found.values()):  # which may be a busy machine's fault
                self._kept.keep(environment, made_of, _FAULTS.dump_json(found))
        return found


def modules_of(distribution: Distribution) -> list[str]:
    """What a user imports of a distribution, by its own list of files: what is called as it is, else all that is there.

    A namespace, such as nvidia, is no module of anybody's.
    """
    rows = csv.reader((distribution.read_text("RECORD") or "").splitlines())
    tops = dict.fromkeys(name for file, *_ in rows for name in _top(file))
    called = canonicalize_name(distribution.metadata["Name"]).removesuffix("-python").replace("-", "_")
    return [called] if called in tops else [name for name in tops if name.isidentifier() and not name.startswith("_")]


def _top(file: str) -> Iterator[str]:
    first, _, rest = file.partition("/")
    if rest == "__init__.py":
        yield first
    elif not rest and first.endswith((".py", ".so")):
        yield first.partition(".")[0]


def import_faults(modules: Sequence[str], seconds: float = SECONDS) -> dict[str, str]:
    """Import each module in a process of its own, as many at once as there are cores."""
    found, at_once = dict[str, str](), os.cpu_count() or 1
    for start in range(0, len(modules), at_once):
        found |= _together(modules[start : start + at_once], seconds)
    return found


def _together(modules: Sequence[str], seconds: float) -> dict[str, str]:
    until = time.monotonic() + seconds
    with TemporaryDirectory(prefix="refgrid-imports-") as folder, contextlib.ExitStack() as started:
        files = {module: Path(folder, module) for module in modules}
        processes = {module: started.enter_context(_importing(module, file)) for module, file in files.items()}
        ended = {module: _ended(processes[module], file, until, seconds) for module, file in files.items()}
    return {module: told for module, told in ended.items() if told}


@contextlib.contextmanager
def _importing(module: str, told: Path) -> Iterator[subprocess.Popen[bytes]]:
    """With whatever it starts, it is gone afterwards."""
    command, quiet = [sys.executable, "-c", _PROGRAM, module, str(told)], subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _ended(process: subprocess.Popen[bytes], told: Path, until: float, seconds: float) -> str:
    """How an import failed; empty where it did not."""
    try:
        status = process.wait(max(0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        return f"{_HANGS} {seconds:g} s"
    if told.is_file():
        raised = json.loads(told.read_text(encoding="utf-8"))
        return _raised(*raised) if raised else ""
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"ends its interpreter with {how}"


def _raised(exception: str, message: str, *causes: str) -> str:
    """The first line, and what is said of a driver, wherever that is."""
    first = _plain(next((line for line in message.splitlines() if line.strip()), "without a word"))
    lines = (line for told in (message, *causes) for line in told.splitlines())
    needs = next((_plain(line) for line in lines if _NO_DRIVER.search(line)), "")
    if not needs:
        return f"raises {exception}: {first}"
    return f"raises {exception}: {first}; it needs a GPU's driver" + (f": {needs}" if needs != first else "")


def _plain(line: str) -> str:
    """Without folders, which are other ones on every machine."""
    return _FOLDERS.sub("", line.strip("- "))[:LONGEST]


def _state(modules: Sequence[str]) -> str:
    """All that is installed and when, and what else decides what an import comes to."""
    infos = (info for place in sys.path for info in sorted(Path(place).glob("*.dist-info")))
    there = [(str(info), info.stat().st_mtime_ns) for info in infos]
    told = [sys.version, sys.executable, *modules, there, driver(), [os.environ.get(name) for name in _READ]]
    return hash_of(json.dumps(told).encode())

"""Kernel modules that were compiled during a run though all had been compiled ahead of it.

`refgrid warm` leaves a stamp beside the modules. A run that finds it compares the modules before its first case and
after its last: what is new or newer cost a case its time on the GPU, and was missing in the list of what to compile.
Modules are shared libraries, FlashInfer's and those that other libraries build by tvm-ffi. What Triton, CuTe DSL and
DeepGEMM compile is compiled at a first call by design and is no finding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

STAMP = "refgrid-warm.json"
_MODULES = "*/*.so"  # in tvm-ffi's folder each has one of its own; what lies beside them is tvm-ffi's


@dataclass(frozen=True)
class Stamp:
    """What was compiled ahead: modules by name, for which GPUs, and with which versions."""

    modules: tuple[str, ...]
    architectures: str
    versions: Mapping[str, str]


def folder_of(base: Path | None) -> Path:
    """Where FlashInfer keeps its modules; `base` is its setting, else the home folder."""
    return (base or Path.home()) / ".cache" / "flashinfer"


def write_stamp(base: Path | None, stamp: Stamp) -> Path:
    """Leave the stamp; what an earlier one of the same versions says stays true."""
    file = folder_of(base) / STAMP
    before = read_stamp(base)
    if before and (before.architectures, before.versions) == (stamp.architectures, stamp.versions):
        stamp = Stamp(tuple(sorted({*before.modules, *stamp.modules})), stamp.architectures, stamp.versions)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{STAMP}-{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(stamp), indent=1), encoding="utf-8")
    unfinished.replace(file)
    return file


def read_stamp(base: Path | None) -> Stamp | None:
    """The stamp of the last warm; None where nothing was compiled ahead, or nobody can read what."""
    try:
        found = json.loads((folder_of(base) / STAMP).read_text(encoding="utf-8"))
        return Stamp(tuple(found["modules"]), found["architectures"], found["versions"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


class CompiledModules:
    """The modules that were there when this was made; without a stamp, nothing is ever late.

    Those in tvm-ffi's folder count where some were compiled ahead: of a release that cannot tell them, none are.
    """

    def __init__(self, base: Path | None, tvm_ffi: Path | None = None) -> None:
        self._folders: list[tuple[Path, str]] = []
        if stamp := read_stamp(base):
            self._folders.append((folder_of(base), "**/*.so"))
            if tvm_ffi and not set(stamp.modules).isdisjoint(_names(_built(tvm_ffi, _MODULES))):
                self._folders.append((tvm_ffi, _MODULES))
        self._before = self._all()

    def late(self) -> list[str]:
        """A finding for each module that is new or newer now."""
        now = self._all()
        return [
            f"compiled late: {name}" for name in _names(file for file in now if now[file] != self._before.get(file))
        ]

    def _all(self) -> dict[Path, int]:
        return {file: when for folder in self._folders for file, when in _built(*folder).items()}


def _built(folder: Path, pattern: str) -> dict[Path, int]:
    """When each was built; one that vanishes meanwhile is being built anew by somebody else."""
    found = {}
    for file in folder.glob(pattern):
        try:
            found[file] = file.stat().st_mtime_ns
        except FileNotFoundError:
            continue
    return found


def _names(files: Iterable[Path]) -> list[str]:
    """Of the folder that each has: SGLang's also say for which GPU."""
    return sorted({file.parent.name for file in files})

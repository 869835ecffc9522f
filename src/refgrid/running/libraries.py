"""Compiled libraries that were cut short, as by a compiler that was killed: loading one can kill a process.

One of the right length that is damaged inside is not found: what the loader refuses is an error with its name, what
kills a process a crash without it, and what computes something else a mismatch.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from refgrid.overlays.overlay import CACHES

# Of an ELF file's head, 64 bit, little endian: where its table of sections begins, an entry's size, and their number.
# Linkers write that table last.
_HEAD = struct.Struct("<4s36xQ10xHH2x")


def cut_short(variables: Mapping[str, str] = os.environ) -> list[Path]:
    """Every library in the caches of compiled kernels that ends before its head says it does."""
    folders = [Path(variables[name]) for name in CACHES if variables.get(name)]
    return sorted({path for folder in folders for path in _libraries(folder) if _is_cut_short(path)})


def _libraries(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*.so") if path.is_file())


def _is_cut_short(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return True
    magic, sections, size, count = _HEAD.unpack(head)
    return bool(magic != b"\x7fELF" or path.stat().st_size < sections + size * count)

"""Evidence that is kept: the runs of record files, packed into one file for each environment and machine kind."""

from __future__ import annotations

import contextlib
import gzip
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from refgrid.records.record import Header, RecordError, lines_of, runs_of


class _Kept(NamedTuple):
    """The lines of one run as they were written, and how many cases have a verdict in them."""

    started: str
    outcomes: int
    lines: bytes


def keep(files: Iterable[Path], folder: Path, name_of: Callable[[Header], str]) -> dict[Path, int]:
    """Add the runs of these files to `folder/<name_of(header)>.jsonl.gz`; returns each file and how many runs it holds.

    A run that is there already is taken as it was when it had got furthest. A plain file of that name is packed with
    the others and removed. Raises RecordError, before anything is written, for a file that cannot be read.
    """
    named: dict[str, dict[str, _Kept]] = defaultdict(dict)
    for file in files:
        for header, kept in _runs(file):
            _put(named[name_of(header)], header.run, kept)
    for name, runs in named.items():
        for there in _there(folder, name):
            for header, kept in _runs(there):
                _put(runs, header.run, kept)
    return {_write(folder, name, runs.values()): len(runs) for name, runs in sorted(named.items())}


def _put(runs: dict[str, _Kept], run: str, kept: _Kept) -> None:
    runs[run] = max(kept, runs.get(run, kept), key=lambda each: each.outcomes)


def _there(folder: Path, name: str) -> list[Path]:
    return [file for end in (".jsonl", ".jsonl.gz") if (file := folder / f"{name}{end}").is_file()]


def _runs(file: Path) -> Iterator[tuple[Header, _Kept]]:
    """Reading finds what is wrong; the lines that were read are kept as they are."""
    read = list(runs_of(file))
    parts: list[list[bytes]] = []
    for line in lines_of(file):
        if line.kind == "run":
            parts.append([])
        parts[-1].append(line.text + b"\n")  # a kill may have left a whole line without it
    for run, lines in zip(read, parts, strict=True):
        yield run.header, _Kept(run.header.started, len(run.outcomes), b"".join(lines))


def _write(folder: Path, name: str, runs: Iterable[_Kept]) -> Path:
    file = folder / f"{name}.jsonl.gz"
    unfinished = file.with_suffix(f".{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without the time of day in it, the same runs are the same bytes.
        unfinished.write_bytes(gzip.compress(b"".join(run.lines for run in sorted(runs)), mtime=0))
        unfinished.replace(file)
    except OSError as error:
        raise RecordError(f"{file}: records cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    (folder / f"{name}.jsonl").unlink(missing_ok=True)
    return file

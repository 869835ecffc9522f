"""Digests of record files: as much of each outcome as the matrix shows, so that old evidence is read in a moment.

A digest is a file of records itself, with the largest error instead of the comparisons and the seconds as one sum. Its
name has the size and the time of the file that it is of, so a changed file has none, and it can be thrown away at any
time.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from refgrid.records.record import Header, Outcome, Run, record_paths, runs_of

# What is smaller is read as fast as its digest would be.
_WORTH_IT = 2**20
_LEFT_OUT = ("comparisons", "seconds", "axes")
_ALL = "all"  # under which name the seconds of a case stand, summed
# What the fields of a digest mean: another word here whenever that changes and their names do not.
_MEANING = "seconds-summed"
# Another shape of records, or another meaning, needs other digests.
_SHAPE = ",".join([_MEANING, *(field.name for kind in (Header, Outcome, Run) for field in fields(kind))])


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Records have no cycles, and looking for some takes a third of the time of reading and counting them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_digested(folder: Path, digests: Path) -> list[Run]:
    """As `read_runs`, without the details of comparisons; `digests` is the folder to keep them in.

    Raises RecordError as that does.
    """
    runs = [run for path in record_paths(folder) for run in _runs(path, digests)]
    return sorted(runs, key=lambda run: run.header.started)


def _runs(path: Path, digests: Path) -> Sequence[Run]:
    found = path.stat()
    if found.st_size < _WORTH_IT:
        return list(runs_of(path))
    of_path = hashlib.sha256(f"{path.resolve()} {_SHAPE}".encode()).hexdigest()[:16]
    digest = digests / f"{of_path}-{found.st_size}-{found.st_mtime_ns}.digest"
    if digest.is_file():
        return [replace(run, file=path) for run in runs_of(digest)]
    runs = list(runs_of(path))
    if any(outcome.comparisons for run in runs for outcome in run.outcomes.values()):
        _keep(runs, digest, digests.glob(f"{of_path}-*.digest"))
    return runs


def _keep(runs: Sequence[Run], digest: Path, older: Iterator[Path]) -> None:
    """A folder that cannot be written costs time, nothing else."""
    unfinished = digest.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        digest.parent.mkdir(parents=True, exist_ok=True)
        for each in older:
            each.unlink(missing_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for run in runs for line in _lines(run))
        unfinished.replace(digest)


def _lines(run: Run) -> Iterator[dict[str, Any]]:
    yield {"type": "run", **asdict(run.header)}
    for outcome in run.outcomes.values():
        yield {"type": "outcome", **_short(outcome)}
    if run.finished:
        yield {"type": "end", "findings": run.late_findings, "stopped": run.stopped}


def _short(outcome: Outcome) -> dict[str, Any]:
    errors = [{"headroom": each["headroom"]} for each in outcome.comparisons if each.get("headroom") is not None]
    told = {name: value for name, value in vars(outcome).items() if value and name not in _LEFT_OUT}
    if outcome.seconds:
        told["seconds"] = {_ALL: sum(outcome.seconds.values())}
    return {**told, "case": outcome.case.id, "verdict": outcome.verdict.value, "comparisons": errors}

"""Digests of record files: as much of each outcome as the matrix shows, so that old evidence is read in a moment.

Cases of one file end in some thousand different ways, if what was measured of each is left aside: a digest tells each
case and each way once, and of an outcome by number which case ended in which way, with its largest errors instead of
the comparisons and its seconds as one sum. Its name has the size and the time of the file that it is of and a hash of
the code that made it, its first line a hash of the rest: where one of them does not fit, the file itself is read. It
can be thrown away at any time.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import inspect
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import xxhash
from pydantic import TypeAdapter

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records.record import Header, Outcome, Run, record_paths, runs_of

# What is smaller, even packed, is read as fast as its digest would be.
_WORTH_IT = 2**17
_LEFT_OUT = ("case", "comparisons", "seconds", "axes")
_HASHES_LEFT_OUT = ("key", "inputs", "workload")  # nearly every case has others, and no reader of digests asks for them
_ALL = "all"  # under which name the seconds of a case stand, summed
# What reading a digest raises that is damaged, or was written by something else.
_UNUSABLE = (OSError, ValueError, TypeError, LookupError)

_HEADER, _OUTCOME = TypeAdapter(Header), TypeAdapter(Outcome)


# The files of what writes and reads digests, and of what they hold.
_FILES = (Path(__file__), *(Path(inspect.getfile(kind)) for kind in (Run, Case, Environment)))


def _made_by(files: Iterable[Path]) -> str:
    """Other code needs other digests: what they hold may mean something else to it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


_CODE = _made_by(_FILES)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Records have no cycles, and looking for some takes a third of the time of reading and counting them.

    Nor is what was made looked at afterwards, where a process often ends.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.freeze()
            gc.enable()


def read_digested(folder: Path, digests: Path) -> list[Run]:
    """As `read_runs`, without the details of comparisons; `digests` is the folder to keep them in.

    Raises RecordError as that does.
    """
    known: dict[tuple[Any, ...], Case] = {}
    runs = [run for path in record_paths(folder) for run in _runs(path, digests, known)]
    return sorted(runs, key=lambda run: run.header.started)


def _runs(path: Path, digests: Path, known: dict[tuple[Any, ...], Case]) -> list[Run]:
    found = path.stat()
    if found.st_size < _WORTH_IT:
        return list(runs_of(path))
    of_path = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    digest = digests / f"{of_path}-{found.st_size}-{found.st_mtime_ns}-{_CODE}.digest"
    with contextlib.suppress(*_UNUSABLE):  # the file itself has all
        return _read(digest.read_bytes(), path, known)
    runs = list(runs_of(path))
    if any(outcome.comparisons for run in runs for outcome in run.outcomes.values()):
        _keep(_written(runs), digest, digests.glob(f"{of_path}-*.digest"))
    return runs


def _keep(text: bytes, digest: Path, older: Iterator[Path]) -> None:
    """A folder that cannot be written costs time, nothing else."""
    unfinished = digest.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):
        digest.parent.mkdir(parents=True, exist_ok=True)
        for each in older:
            each.unlink(missing_ok=True)
        unfinished.write_bytes(text)
        unfinished.replace(digest)


def _written(runs: Sequence[Run]) -> bytes:
    cases: dict[Case, int] = {}
    endings: dict[str, int] = {}
    told = [_told(run, cases, endings) for run in runs]
    ended = [json.loads(ending) for ending in endings]
    text = json.dumps({"cases": [astuple(case) for case in cases], "endings": ended, "runs": told}).encode()
    return _hash(text) + b"\n" + text


def _told(run: Run, cases: dict[Case, int], endings: dict[str, int]) -> dict[str, Any]:
    """A run by the numbers of its cases and their endings, which are added to the tables where they are new."""
    outcomes = [
        (
            cases.setdefault(outcome.case, len(cases)),
            endings.setdefault(json.dumps(_ending(outcome)), len(endings)),
            [each["headroom"] for each in outcome.comparisons if each.get("headroom") is not None],
            sum(outcome.seconds.values()) if outcome.seconds else None,
        )
        for outcome in run.outcomes.values()
    ]
    planned = [cases.setdefault(case, len(cases)) for case in run.header.planned]
    header = {**vars(run.header), "planned": (), "environment": asdict(run.header.environment)}
    ended = {"finished": run.finished, "findings": run.late_findings, "stopped": run.stopped}
    return {"header": header, "planned": planned, "outcomes": outcomes, **ended}


def _ending(outcome: Outcome) -> dict[str, Any]:
    told = {name: value for name, value in vars(outcome).items() if value and name not in _LEFT_OUT}
    hashes = {name: value for name, value in outcome.hashes.items() if name not in _HASHES_LEFT_OUT}
    return {**told, "verdict": outcome.verdict.value, "hashes": hashes}


def _read(digest: bytes, path: Path, known: dict[tuple[Any, ...], Case]) -> list[Run]:
    """The runs of a file; `known` are cases of other files. Raises ValueError for a digest that is not as written."""
    head, _, text = digest.partition(b"\n")
    if head != _hash(text):
        raise ValueError("is not as it was written")
    told = json.loads(text)
    cases = [known.get(row) or known.setdefault(row, Case(*row)) for row in map(tuple, told["cases"])]
    endings = [vars(_OUTCOME.validate_python({**each, "case": cases[0]})) for each in told["endings"]]
    return [_run(each, path, cases, endings) for each in told["runs"]]


def _run(told: Mapping[str, Any], path: Path, cases: Sequence[Case], endings: Sequence[dict[str, Any]]) -> Run:
    header = _HEADER.validate_python({**told["header"], "planned": tuple(cases[number] for number in told["planned"])})
    outcomes = {each.case.id: each for each in _outcomes(told["outcomes"], cases, endings)}
    return Run(header, outcomes, told["finished"], path, tuple(told["findings"]), told["stopped"])


def _outcomes(
    told: Iterable[tuple[int, int, list[Any], float | None]], cases: Sequence[Case], endings: Sequence[dict[str, Any]]
) -> Iterator[Outcome]:
    """Each with the fields of its ending, which were checked once: to check every outcome would take the longest."""
    for case, ending, errors, seconds in told:
        outcome = object.__new__(Outcome)
        measured = {"comparisons": tuple({"headroom": error} for error in errors)} if errors else {}
        spent = {} if seconds is None else {"seconds": {_ALL: seconds}}
        vars(outcome).update(endings[ending], case=cases[case], **measured, **spent)
        yield outcome


def _hash(text: bytes) -> bytes:
    return xxhash.xxh3_128_hexdigest(text).encode()

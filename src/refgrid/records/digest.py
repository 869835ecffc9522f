"""Digests of record files: as much of each outcome as the matrix shows, so that old evidence is read in a moment.

Cases of one file end in some thousand different ways, if what was measured of each is left aside: a digest tells each
case and each way once, and of an outcome by number which case ended in which way, with its largest errors instead of
the comparisons and its seconds as one sum. It is of the file's very bytes: where there is none of these, or it is
damaged, the file itself is read.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records import derived
from refgrid.records.derived import Derived, hash_of
from refgrid.records.record import Header, Outcome, RecordError, Run, record_paths, runs_of

# What is smaller, even packed, is read as fast as its digest would be.
_WORTH_IT = 2**17
_LEFT_OUT = ("case", "comparisons", "seconds", "axes")
_HASHES_LEFT_OUT = ("key", "inputs", "workload")  # nearly every case has others, and no reader of digests asks for them
_ALL = "all"  # under which name the seconds of a case stand, summed

_HEADER, _OUTCOME, _NAMES = TypeAdapter(Header), TypeAdapter(Outcome), TypeAdapter(frozenset[str])


# The files of what writes and reads digests, and of what they hold.
CODE = (Path(__file__), *(Path(inspect.getfile(each)) for each in (derived, Run, Case, Environment)))


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
    runs = [run for file in digested(folder, digests) for run in file.runs]
    return sorted(runs, key=lambda run: run.header.started)


def digested(folder: Path, digests: Path) -> list[Digested]:
    """The files of records below a folder, sorted."""
    known: dict[tuple[Any, ...], Case] = {}
    return [Digested(path, digests, known) for path in record_paths(folder)]


class Digested:
    """A file of records, read as little as what is asked of it needs; raises RecordError as `read_runs` does."""

    def __init__(self, path: Path, digests: Path, known: dict[tuple[Any, ...], Case]) -> None:
        """`known` are cases of other files."""
        self.path, self._known, self._of = path, known, str(path.resolve())
        self._digests, self._names = Derived(digests, "digest", CODE), Derived(digests, "names", CODE)

    @cached_property
    def hash(self) -> str:
        """Of its bytes."""
        try:
            return hash_of(self.path.read_bytes())
        except OSError as error:
            raise RecordError(f"{self.path}: records cannot be read: {error.strerror or error}") from error

    @cached_property
    def names(self) -> frozenset[str]:
        """Its environments on their machines, its runs, and the runs that it takes evidence from."""
        kept = self._names.read(self._of, self.hash, _NAMES.validate_json)
        names = frozenset(_names(self.runs)) if kept is None else kept
        if kept is None and self._is_worth_it:
            self._names.keep(self._of, self.hash, json.dumps(sorted(names)).encode())
        return names

    @cached_property
    def runs(self) -> list[Run]:
        """Without the details of comparisons."""
        if not self._is_worth_it:
            return list(runs_of(self.path))
        kept = self._digests.read(self._of, self.hash, lambda text: _read(text, self.path, self._known))
        return self._read_anew() if kept is None else kept

    def _read_anew(self) -> list[Run]:
        runs = list(runs_of(self.path))
        if any(outcome.comparisons for run in runs for outcome in run.outcomes.values()):
            self._digests.keep(self._of, self.hash, _written(runs))
        return runs

    @property
    def _is_worth_it(self) -> bool:
        return self.path.stat().st_size >= _WORTH_IT


def _names(runs: Iterable[Run]) -> Iterator[str]:
    for run in runs:
        yield from (run.header.environment.title, run.header.run)
        yield from (outcome.evidence for outcome in run.outcomes.values() if outcome.evidence)


def _written(runs: Sequence[Run]) -> bytes:
    cases: dict[Case, int] = {}
    endings: dict[str, int] = {}
    told = [_told(run, cases, endings) for run in runs]
    ended = [json.loads(ending) for ending in endings]
    return json.dumps({"cases": [astuple(case) for case in cases], "endings": ended, "runs": told}).encode()


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
    """The runs of a file; `known` are cases of other files."""
    told = json.loads(digest)
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

"""Records: one JSON line a case, written and flushed as soon as it is known, and read back by the matrix.

A file is a sequence of runs; a run is a header line (environment and every planned case), outcome lines, an end line.
A run without an end line was killed; what it planned and did not record is `not-run`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from refgrid.case import Case
from refgrid.environment import Environment


class Verdict(str, Enum):
    """What became of a case, worst first; exactly one each."""

    CRASH = "crash"
    HANG = "hang"
    MISMATCH = "mismatch"
    NONDETERMINISTIC = "nondeterministic"
    ERROR = "error"
    OOM = "oom"
    IMPORT_FAIL = "import-fail"
    INSTALL_FAIL = "install-fail"
    NO_COMPILER = "no-compiler"
    UNRESOLVABLE = "unresolvable"
    NOT_RUN = "not-run"
    NO_GROUND_TRUTH = "no-ground-truth"
    API_ABSENT = "api-absent"
    UNSUPPORTED = "unsupported"
    MISSING = "missing"
    EXPECTED = "expected"
    CACHED = "cached"
    MATCH = "match"

    @property
    def colour(self) -> Literal["green", "yellow", "red"]:
        """green: proven. yellow: nothing was proven and nothing is known to be wrong. red: something is wrong."""
        if self in _GREEN:
            return "green"
        return "yellow" if self in _UNPROVEN else "red"


_GREEN = frozenset({Verdict.MATCH, Verdict.EXPECTED, Verdict.CACHED})
_UNPROVEN = frozenset(
    {Verdict.MISSING, Verdict.UNSUPPORTED, Verdict.API_ABSENT, Verdict.NO_GROUND_TRUTH, Verdict.UNRESOLVABLE}
    | {Verdict.NOT_RUN}
)


@checked(frozen=True)
class Outcome:
    """How one case ended.

    `comparisons` are refgrid.compare.Comparison as dictionaries, `seconds` and `hashes` say what was spent and used;
    `axes` are those that were run, `shrunk` says from what to what some were cut because the workload did not fit into
    the memory there was.
    """

    case: Case
    verdict: Verdict
    reason: str = ""
    comparisons: tuple[dict[str, Any], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    shrunk: Mapping[str, tuple[int, int]] = field(default_factory=dict)


@checked(frozen=True)
class Header:
    """The first line of a run: where it ran and every case it owes."""

    run: str
    started: str
    refgrid: str
    environment: Environment
    planned: tuple[Case, ...]


@dataclass(frozen=True)
class Run:
    """One run as read back; `finished` is False when its end line is missing."""

    header: Header
    outcomes: Mapping[str, Outcome]
    finished: bool
    file: Path

    def accounted(self) -> list[Outcome]:
        """One outcome for every planned case, in planned order: what was not recorded is `not-run`."""
        why = "the run finished without it" if self.finished else "the run ended before its turn"
        return [self.outcomes.get(case.id) or Outcome(case, Verdict.NOT_RUN, why) for case in self.header.planned]

    def as_of(self, references: Mapping[str, str]) -> Run:
        """The run as evidence for today's references, given by definition as the SHA-256 of their text.

        What was measured with another text is `not-run`: it proves nothing about the one that is published now.
        """
        outcomes = {case_id: _today(outcome, references) for case_id, outcome in self.outcomes.items()}
        return replace(self, outcomes=outcomes)


# How an outcome says that the table of tolerances did not hold for it; the matrix counts these.
BY_HAND = "tolerance set to {} by hand"
# How it says that a workload was cut; `Outcome.shrunk` has the numbers.
CUT = "cut to fit into memory: {}"


class RecordError(RuntimeError):
    """Records cannot be written or read: names the file and the reason."""


class Ledger:
    """The writer of one run: refuses a case that was not planned or that is already closed.

    Raises RecordError when the folder cannot take the run, before the first case.
    """

    # What one outcome takes with two compared outputs, measured at 2.2 kB; asked for before the first case.
    BYTES_PER_CASE = 4096

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self._open = {case.id: case for case in header.planned}
        self.verdicts: Counter[str] = Counter()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _demand_space(path.parent, self.BYTES_PER_CASE * (len(header.planned) + 1))
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{path}: records cannot be written: {error.strerror or error}") from error
        self._write({"type": "run", **asdict(header)})

    def close_case(self, outcome: Outcome) -> None:
        """Write one outcome now; raises RecordError for a case that is unknown or already has its verdict."""
        if outcome.case.id not in self._open:
            raise RecordError(f"{outcome.case.id}: is not planned in this run or already has a verdict")
        self._write({"type": "outcome", **_plain(outcome)})
        del self._open[outcome.case.id]
        self.verdicts[outcome.verdict.value] += 1

    def finish(self, reason: str) -> None:
        """Close every open case as `not-run` with the reason, then the run."""
        for case in list(self._open.values()):
            self.close_case(Outcome(case, Verdict.NOT_RUN, reason))
        self._write({"type": "end", "verdicts": dict(self.verdicts)})
        self._file.close()

    @property
    def open_cases(self) -> Mapping[str, Case]:
        """The planned cases that have no verdict yet."""
        return self._open

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise RecordError(f"{self.path}: a record cannot be written: {error.strerror or error}") from error


def read_runs(folder: Path) -> list[Run]:
    """Every run in every `*.jsonl` below the folder, oldest first.

    A last line that a kill cut short is left out; any other unreadable line raises RecordError naming file and line.
    """
    runs = [run for path in sorted(folder.rglob("*.jsonl")) for run in _runs(path)]
    return sorted(runs, key=lambda run: run.header.started)


def _today(outcome: Outcome, references: Mapping[str, str]) -> Outcome:
    measured, today = outcome.hashes.get("reference"), references.get(outcome.case.definition)
    if measured is None or today is None or measured == today:
        return outcome
    return Outcome(outcome.case, Verdict.NOT_RUN, f"the reference has changed since it was {outcome.verdict.value}")


def now() -> str:
    """The time of day as records write it: UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


_HEADER = TypeAdapter(Header)
_OUTCOME = TypeAdapter(Outcome)
_Line = TypeVar("_Line", Header, Outcome)


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The case by its id alone: the header holds the rest."""
    return {**asdict(outcome), "case": outcome.case.id, "verdict": outcome.verdict.value}


def _demand_space(folder: Path, size: int) -> None:
    """Fail now, not at the thousandth record, when the disk or the quota cannot hold the run."""
    probe = folder / f".space-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def _runs(path: Path) -> Iterator[Run]:
    header: Header | None = None
    outcomes: dict[str, Outcome] = {}
    cases: dict[str, Case] = {}
    for number, kind, line in _lines(path):
        if kind == "run":
            if header:
                yield Run(header, outcomes, False, path)
            header, outcomes = _parsed(path, number, _HEADER, line), {}
            cases = {case.id: case for case in header.planned}
        elif header is None:
            raise RecordError(f"{path}: begins with a {kind!r} line but should begin with a 'run' line")
        elif kind == "outcome":
            case = _planned(path, number, cases, line.get("case"))
            outcomes[case.id] = _parsed(path, number, _OUTCOME, {**line, "case": case})
        elif kind == "end":
            yield Run(header, outcomes, True, path)
            header = None
    if header:
        yield Run(header, outcomes, False, path)


def _lines(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    lines = path.read_bytes().split(b"\n")
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            kind = line.pop("type")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                return  # no newline after it: the writer was killed in the middle of this line
            raise RecordError(f"{path}:{number}: is no record: {error}") from error
        yield number, kind, line


def _planned(path: Path, number: int, cases: Mapping[str, Case], case_id: object) -> Case:
    case = cases.get(str(case_id))
    if case is None:
        raise RecordError(f"{path}:{number}: {case_id!r} is no case that its run planned")
    return case


def _parsed(path: Path, number: int, adapter: TypeAdapter[_Line], line: Mapping[str, Any]) -> _Line:
    try:
        return adapter.validate_python(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{path}:{number}: {where}: {first['msg']}") from error


def verdict_counts(outcomes: Iterable[Outcome]) -> dict[Verdict, int]:
    """How many outcomes ended in which verdict, worst first."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return {verdict: counts[verdict] for verdict in Verdict if counts[verdict]}

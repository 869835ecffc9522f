"""Records: one JSON line a case, written and flushed as soon as it is known, and read back by the matrix.

A file is a sequence of runs; a run is a header line (environment and every planned case), outcome lines, an end line.
A run without an end line was killed; what it planned and did not record is `not-run`. A `resume` line opens a killed or
interrupted run again: outcomes after it take the place of `not-run` ones, and of no others.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment


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

    `comparisons` are `proving.compare.Comparison` as dictionaries, `seconds` and `hashes` say what was spent and used;
    `axes` are those that were run, `shrunk` says from what to what some were cut because the workload did not fit into
    the memory there was. `evidence` names the run whose outcome stands, where nothing had changed;
    `device` is the GPU that it ran on, by name and UUID. `report` says of a failure, in several lines, what has no room
    in `reason`: where it clusters, what explains it, the worst elements, and the command that runs the case alone.
    """

    case: Case
    verdict: Verdict
    reason: str = ""
    comparisons: tuple[dict[str, Any], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    shrunk: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    evidence: str = ""
    device: str = ""
    report: str = ""


@checked(frozen=True)
class Header:
    """The first line of a run: where it ran, every case it owes, and what the audit found before the first.

    `parts` are those of the keys of all its cases, see refgrid.caching.key. A `soak` looks for false alarms over fresh
    seeds: it is no evidence for the matrix, and no other run takes an outcome from it. `command` is how pytest was
    called.
    """

    run: str
    started: str
    refgrid: str
    environment: Environment
    planned: tuple[Case, ...]
    findings: tuple[str, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    soak: bool = False
    command: str = ""


@dataclass(frozen=True)
class Run:
    """One run as read back; `finished` is False when its end line is missing.

    `late_findings` are those of the end line, which nobody could know before the first case; `stopped` is why the rest
    had no turn, where there was a rest.
    """

    header: Header
    outcomes: Mapping[str, Outcome]
    finished: bool
    file: Path
    late_findings: tuple[str, ...] = ()
    stopped: str = ""

    @property
    def findings(self) -> tuple[str, ...]:
        """What is odd about where it ran, each once: the audit's findings, then the late ones."""
        return tuple(dict.fromkeys((*self.header.findings, *self.late_findings)))

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
# Why a case was not run that could be run when its run goes on.
INTERRUPTED = "the run was interrupted before its turn"


class RecordError(RuntimeError):
    """Records cannot be written or read: names the file and the reason."""


def read_runs(folder: Path) -> list[Run]:
    """Every run in every file of records below the folder, oldest first.

    A last line that a kill cut short is left out; any other unreadable line raises RecordError naming file and line.
    """
    runs = [run for path in record_paths(folder) for run in runs_of(path)]
    return sorted(runs, key=lambda run: run.header.started)


def record_paths(folder: Path) -> list[Path]:
    """The files of records below a folder, sorted: `*.jsonl`, and `*.jsonl.gz`, which `refgrid keep` packs."""
    return sorted(path for pattern in ("*.jsonl", "*.jsonl.gz") for path in folder.rglob(pattern))


def record_bytes(path: Path) -> bytes:
    """The lines of a file of records, unpacked; raises OSError where it cannot be read or is no gzip."""
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        return gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error) as error:
        raise OSError(f"is no whole gzip file: {error}") from error


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
_FINDINGS = TypeAdapter(tuple[str, ...])
_Line = TypeVar("_Line", Header, Outcome, tuple[str, ...])


def runs_of(path: Path) -> Iterator[Run]:
    """The runs of one file, in its order; raises RecordError as `read_runs` does."""
    run: _Reading | None = None
    for number, kind, line, _ in lines_of(path):
        if kind == "run":
            if run:
                yield run.read()
            run = _Reading(path, _parsed(path, number, _HEADER, line))
        elif run is None:
            raise RecordError(f"{path}: begins with a {kind!r} line but should begin with a 'run' line")
        else:
            run.take(number, kind, line)
    if run:
        yield run.read()


class _Reading:
    """One run while its lines are read."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._header = path, header
        self._cases = {case.id: case for case in header.planned}
        self._outcomes: dict[str, Outcome] = {}
        self._finished, self._stopped = False, ""
        self._findings: tuple[str, ...] = ()

    def take(self, number: int, kind: str, line: Mapping[str, Any]) -> None:
        if kind == "outcome":
            self._outcome(number, line)
        elif kind == "end":
            self._finished, self._stopped = True, str(line.get("stopped", ""))
            self._findings += _parsed(self._path, number, _FINDINGS, line.get("findings", ()))
        elif kind == "resume":  # what had no turn may have one now; every other verdict stays
            self._finished, self._stopped = False, ""
            self._outcomes = {
                name: each for name, each in self._outcomes.items() if each.verdict is not Verdict.NOT_RUN
            }

    def read(self) -> Run:
        return Run(self._header, self._outcomes, self._finished, self._path, self._findings, self._stopped)

    def _outcome(self, number: int, line: Mapping[str, Any]) -> None:
        case = self._cases.get(str(line.get("case")))
        if case is None:
            raise _damaged(self._path, number, f"{line.get('case')!r} is no case that its run planned")
        if self._finished or case.id in self._outcomes:
            what = "stands after the end of its run" if self._finished else "has its verdict already"
            raise _damaged(self._path, number, f"{case.id} {what}, and only a 'resume' line opens a run again")
        self._outcomes[case.id] = _parsed(self._path, number, _OUTCOME, {**line, "case": case})


class Line(NamedTuple):
    """One line of a file of records: its number, its type, what else it says, and how it was written, less its end."""

    number: int
    kind: str
    told: dict[str, Any]
    text: bytes


def lines_of(path: Path) -> Iterator[Line]:
    """Every line that is not empty; a last one that a kill cut short is left out, a whole one needs no newline.

    Raises RecordError as `read_runs` does.
    """
    try:
        lines = record_bytes(path).split(b"\n")
    except OSError as error:
        raise RecordError(f"{path}: records cannot be read: {error.strerror or error}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            kind = line.pop("type")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            if number == len(lines):
                return  # no newline after it: the writer was killed in the middle of this line
            raise _damaged(path, number, f"is no record: {error}") from error
        yield Line(number, kind, line, text)


def is_whole(line: bytes) -> bool:
    """Whether a last line without newline is a record all the same, which readers take."""
    try:
        return "type" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _parsed(path: Path, number: int, adapter: TypeAdapter[_Line], line: object) -> _Line:
    try:
        return adapter.validate_python(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, number, f"{where}: {first['msg']}") from error


def _damaged(path: Path, number: int, why: str) -> RecordError:
    """What to raise of a line that is no record, with what to do about it."""
    remedy = "take the line out, or put the file away: the cases it told of are owed again"
    return RecordError(f"{path}:{number}: {why}; {remedy}")


def verdict_counts(outcomes: Iterable[Outcome]) -> dict[Verdict, int]:
    """How many outcomes ended in which verdict, worst first."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    return {verdict: counts[verdict] for verdict in Verdict if counts[verdict]}

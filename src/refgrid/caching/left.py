"""A run that was left before its end, killed or interrupted: found, and gone on with if nothing has changed since."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TextIO

from refgrid.caching.evidence import DIED
from refgrid.caching.key import CASE_PARTS, NONE, RUN_PARTS, Keys, differing
from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records.ledger import claim
from refgrid.records.record import INTERRUPTED, Outcome, RecordError, Run, Verdict, runs_of
from refgrid.running.budget import SPENT

_STARTED = re.compile(rb'"started": ?"([^"]+)"')


@dataclass(frozen=True)
class Left:
    """A run to go on with and its file, which is locked against others; or, without a run, why there is none.

    `why_not` is empty where no run was left.
    """

    run: Run | None = None
    file: TextIO | None = None
    why_not: str = ""

    @property
    def done(self) -> dict[str, str]:
        """The cases that have a verdict, with the tolerance they had; without one where their process died."""
        outcomes = self.run.outcomes.values() if self.run else ()
        kept = (each for each in outcomes if each.verdict is not Verdict.NOT_RUN)
        return {each.case.id: "" if each.verdict in DIED else each.hashes["tolerance"] for each in kept}

    def release(self, why_not: str) -> Left:
        """Leave the run as it is."""
        if self.file:
            self.file.close()
        return Left(why_not=why_not)


def left_run(folder: Path, environment: Environment, keys: Keys, cases: Mapping[str, Case], *, cache: bool) -> Left:
    """The newest run of this environment, if it was left and every outcome of it would be the same today.

    Without `cache` a run that took outcomes from others is none to go on with.
    """
    path = _newest(folder, environment)
    run = _only_run(path) if path else None
    if run is None or not _was_left(run):
        return Left()
    why = _why_not(run, environment, keys, cases, cache=cache)
    try:
        file = None if why else claim(run.file)
    except RecordError as error:
        file, why = None, str(error)
    if file:
        return Left(run, file)
    return Left(why_not=f"{told_run(run)}: {why or 'another process is still writing it'}")


def _was_left(run: Run) -> bool:
    """Whether a kill, somebody or a budget ended it before all of its cases had their turn."""
    out_of_time = any(each.verdict is Verdict.NOT_RUN and SPENT.search(each.reason) for each in run.outcomes.values())
    return not run.finished or run.stopped == INTERRUPTED or out_of_time


def told_run(run: Run) -> str:
    """A run as messages name it."""
    return f"run {run.header.run} of {run.header.started[:10]}"


def _why_not(run: Run, environment: Environment, keys: Keys, cases: Mapping[str, Case], *, cache: bool) -> str:
    if not run.header.parts:
        return "it has no keys, so nothing tells whether it would be the same today"
    changes = differing(run.header.parts, keys.run_parts, RUN_PARTS)
    if changes := changes or _measured_changes(run.header.environment, environment):
        return f"changed since: {changes[0]}"
    for outcome in run.outcomes.values():
        if why := _outcome_changed(outcome, keys, cases, cache=cache):
            return f"{outcome.case.id}: {why}"
    return ""


def _outcome_changed(outcome: Outcome, keys: Keys, cases: Mapping[str, Case], *, cache: bool) -> str:
    if outcome.verdict is Verdict.NOT_RUN:
        return ""
    if outcome.case != cases.get(outcome.case.id):
        return "is not planned any more as it was"
    if outcome.evidence and not cache:
        return "was not measured by it, which --no-cache asks for"
    tolerance = outcome.hashes.get("tolerance", "")
    if outcome.hashes.get("key") == keys.key(outcome.case, tolerance):
        return ""
    changes = differing(outcome.hashes, keys.parts(outcome.case, tolerance), CASE_PARTS)
    return f"changed since: {changes[0]}" if changes else "its files were edited while it ran"


def _measured_changes(before: Environment, now: Environment) -> list[str]:
    pairs = ((each.name, getattr(before, each.name), getattr(now, each.name)) for each in fields(Environment))
    return [f"{name} {old or NONE} -> {new or NONE}" for name, old, new in pairs if old != new]


def _newest(folder: Path, environment: Environment) -> Path | None:
    """By the first bytes of each file: headers name every case and are long."""
    starts: dict[Path, str] = {}
    wanted = (f'"name":"{environment.name}"'.encode(), f'"device":"{environment.device}"'.encode())
    for path in folder.glob("*.jsonl"):
        head = _head(path)
        started = _STARTED.search(head)
        if started and all(each in head for each in wanted):
            starts[path] = started[1].decode()
    return max(starts, key=lambda path: (starts[path], path.name), default=None)


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4096)
    except OSError:
        return b""  # it has gone since the folder was looked at


def _only_run(path: Path) -> Run | None:
    """A file of several runs was put together from others and is not gone on with."""
    try:
        runs = list(runs_of(path))
    except (RecordError, OSError):
        return None  # the matrix says what is wrong with it
    return runs[0] if len(runs) == 1 else None

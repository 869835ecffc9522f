"""The ledger: writes the records of one run, one line a case, each written out before the next case begins."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TextIO

from refgrid.dataset.case import Case
from refgrid.records.record import Header, Outcome, RecordError, Run, Verdict, is_whole, now

# One for all lines: to make it takes longer than to encode a short one.
_JSON = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


class Ledger:
    """The writer of one run: refuses a case that was not planned or that is already closed.

    Raises RecordError when the folder cannot take the run, before the first case.
    """

    # What one outcome takes with two compared outputs, measured at 2.2 kB; asked for before the first case.
    BYTES_PER_CASE = 4096

    def __init__(
        self, path: Path, header: Header, claimed: TextIO | None = None, recorded: Iterable[Outcome] = ()
    ) -> None:
        """`claimed` is the file of a run that was left, see `claim`, and `recorded` what it holds: the run goes on."""
        kept = [outcome for outcome in recorded if outcome.verdict is not Verdict.NOT_RUN]
        self.path, self.header = path, header
        self.verdicts = Counter(outcome.verdict.value for outcome in kept)
        self._open = {case.id: case for case in header.planned}
        for outcome in kept:
            del self._open[outcome.case.id]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _demand_space(path.parent, self.BYTES_PER_CASE * (len(self._open) + 1))
            self._file = _at_whole_lines(claimed) if claimed else path.open("a", encoding="utf-8")
        except OSError as error:
            raise RecordError(f"{path}: records cannot be written: {error.strerror or error}") from error
        is_locked(self._file)
        self._write({"type": "resume", "time": now()} if claimed else _told(header))

    @classmethod
    def resumed(cls, run: Run, file: TextIO) -> Ledger:
        """Go on with a run in its own file, which `claim` has opened: what has a verdict keeps it."""
        return cls(run.file, run.header, file, run.outcomes.values())

    def close_case(self, outcome: Outcome) -> None:
        """Write one outcome now; raises RecordError for a case that is unknown or already has its verdict."""
        if outcome.case.id not in self._open:
            raise RecordError(f"{outcome.case.id}: is not planned in this run or already has a verdict")
        self._write({"type": "outcome", **_plain(outcome)})
        del self._open[outcome.case.id]
        self.verdicts[outcome.verdict.value] += 1

    def finish(self, reason: str, findings: Sequence[str] = ()) -> None:
        """Close every open case as `not-run` with the reason, then the run, with what was found on the way."""
        stopped = reason if self._open else ""
        for case in list(self._open.values()):
            self.close_case(Outcome(case, Verdict.NOT_RUN, reason))
        told = {"verdicts": dict(self.verdicts), "findings": list(findings), "stopped": stopped}
        self._write({"type": "end", **told})
        self._file.close()

    @property
    def open_cases(self) -> Mapping[str, Case]:
        """The planned cases that have no verdict yet."""
        return self._open

    def _write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(_JSON.encode(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise RecordError(f"{self.path}: a record cannot be written: {error.strerror or error}") from error


def claim(path: Path) -> TextIO | None:
    """The file of a run that was left, to go on with it; None where a process is still writing it.

    Raises RecordError when it cannot be opened.
    """
    try:
        file = path.open("r+", encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{path}: records cannot be written: {error.strerror or error}") from error
    if is_locked(file):
        return file
    file.close()
    return None


def is_locked(file: TextIO) -> bool:
    """Lock a file as long as it is open, so that no other process goes on with a run that has not ended.

    The lock ends with the process, however that ends; where the system has no such lock, nothing can be resumed.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _at_whole_lines(file: TextIO) -> TextIO:
    """A kill may have ended the writer in the middle of a line, whose case is run again, or just before its newline."""
    raw = Path(file.name).read_bytes()
    last = raw[raw.rfind(b"\n") + 1 :]
    if not is_whole(last):
        file.truncate(len(raw) - len(last))
    file.seek(0, os.SEEK_END)
    if is_whole(last):
        file.write("\n")
    return file


def _told(header: Header) -> dict[str, Any]:
    """Cases are flat: their fields as they are, where `asdict` would look for more in each of many thousands."""
    names = [each.name for each in fields(Case)]
    planned = [{name: getattr(case, name) for name in names} for case in header.planned]
    return {"type": "run", **asdict(replace(header, planned=())), "planned": planned}


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The case by its id alone: the header holds the rest. What is empty is left out, which reads back as empty."""
    told = {**vars(outcome), "case": outcome.case.id, "verdict": outcome.verdict.value}
    return {name: value for name, value in told.items() if value or name == "reason"}


def _demand_space(folder: Path, size: int) -> None:
    """Fail now, not at the thousandth record, when the disk or the quota cannot hold the run."""
    probe = folder / f".space-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size) if hasattr(os, "posix_fallocate") else file.truncate(size)
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()

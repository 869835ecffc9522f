"""What a worker leaves behind for the case that it dies: which case it was in, since when, on which device.

It is one small file a worker, beside the records, overwritten in place, so that a full disk does not stop it; beside it
the file into which faulthandler writes how the process ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TextIO

from refgrid.proving.deaths import innermost_frame, is_timeout, told_death
from refgrid.records.ledger import is_locked
from refgrid.records.record import Verdict, now
from refgrid.running.budget import told_duration

_OWNER = "owner"
_SIZE = 4096  # of a file; a case's id and a device's name are far shorter


def open_folder(folder: Path) -> TextIO:
    """Make the folder of a run's journals, the run's own as long as the file that is returned is open.

    Folders beside it whose run was killed hold nothing that its records do not say, and go. Raises OSError.
    """
    for left in folder.parent.glob(".running-*"):
        with suppress(OSError), (left / _OWNER).open("r+") as owner:
            if is_locked(owner):
                shutil.rmtree(left, ignore_errors=True)
    starting = folder.with_name(folder.name.replace("running", "starting", 1))  # no other run looks at it unlocked
    starting.mkdir(parents=True)
    owner = (starting / _OWNER).open("w")
    is_locked(owner)
    starting.rename(folder)
    return owner


@dataclass(frozen=True)
class Entry:
    """A worker's latest word. `running` is the case it is in, since `since`; `ended` the one before."""

    worker: str
    pid: int
    main_thread: int
    device: str = ""
    running: str = ""
    since: str = ""
    ended: str = ""


class Journal:
    """A worker's side. `dump` is where faulthandler writes."""

    def __init__(self, folder: Path, worker: str, device: str, dump: IO[str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.entry = Entry(worker, os.getpid(), threading.main_thread().ident or 0, device)
        self._file = os.open(folder / f"{worker}.journal", os.O_RDWR | os.O_CREAT, 0o644)
        self.dump = dump or (folder / f"{worker}.dump").open("w")
        self._write(self.entry)
        faulthandler.enable(self.dump)

    def begin(self, case_id: str) -> None:
        """From now on the process's end is the case's."""
        self._write(replace(self.entry, running=case_id, since=now()))

    def end(self) -> None:
        """The case has ended and its outcome is told."""
        self._write(replace(self.entry, running="", since="", ended=self.entry.running))

    def _write(self, entry: Entry) -> None:
        self.entry = entry
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(asdict(entry)).encode().ljust(_SIZE))


def last_entry(folder: Path, worker: str) -> Entry | None:
    """What the worker wrote last; None where it never began a case."""
    try:
        return Entry(**json.loads((folder / f"{worker}.journal").read_bytes()))
    except (FileNotFoundError, ValueError):  # an empty one: it died, or the disk was full, before its first word
        return None


def last_words(folder: Path, worker: str) -> str:
    """What faulthandler wrote as the worker ended; nothing where it had no time to."""
    try:
        return (folder / f"{worker}.dump").read_text(errors="replace")
    except FileNotFoundError:
        return ""


def death(
    entry: Entry, words: str, status: int | None, limit: int, libraries: Sequence[Path] = ()
) -> tuple[Verdict, str]:
    """The verdict and the reason for the case in which a process died.

    `status` is that of subprocess, if known; `libraries` are cut short, so that loading one may have been the reason.
    """
    frame = innermost_frame(words, entry.main_thread)
    where = "".join([f" in {frame}" if frame else "", f" on {entry.device}" if entry.device else ""])
    where += f"; cut short: {', '.join(map(str, libraries))}" if libraries else ""
    whose = f"[worker {entry.worker}, process {entry.pid}, case begun {entry.since}]"
    if is_timeout(words):
        return Verdict.HANG, f"not done within {told_duration(limit)} (--case-timeout), then{where} {whose}"
    return Verdict.CRASH, f"the worker crashed: {told_death(status, words)}{where} {whose}"

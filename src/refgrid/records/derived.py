"""What is derived from files and kept, so that it need not be derived again: texts in a folder, one a file.

The name of each says what it is of, a hash of what it was made of and a hash of the code that made it; its first line
is a hash of the rest. Where one of them does not fit there is no text, and whoever wanted it makes it anew. The folder
can be thrown away at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import xxhash

# What reading a text raises that is missing or damaged, or was written by something else.
_UNUSABLE = (OSError, ValueError, TypeError, LookupError)

_Read = TypeVar("_Read")


class Derived:
    """The texts of one kind in a folder."""

    def __init__(self, folder: Path, kind: str, code: Iterable[Path]) -> None:
        """`code` are the files of what writes and reads these texts, and of what they hold."""
        self._folder, self._kind, self._code = folder, kind, made_by(code)

    def read(self, of: str, made_of: str, read: Callable[[bytes], _Read]) -> _Read | None:
        """What is `of` something, as it was made of these very bytes; None where that is not here."""
        with contextlib.suppress(*_UNUSABLE):
            head, _, text = self._file(of, made_of).read_bytes().partition(b"\n")
            return read(text) if head == hash_of(text).encode() else None
        return None

    def keep(self, of: str, made_of: str, text: bytes) -> None:
        """It takes the place of older ones. A folder that cannot be written costs time, nothing else."""
        file = self._file(of, made_of)
        unfinished = file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            for each in self._folder.glob(f"{_short(of)}-*.{self._kind}"):
                each.unlink(missing_ok=True)
            unfinished.write_bytes(hash_of(text).encode() + b"\n" + text)
            unfinished.replace(file)

    def _file(self, of: str, made_of: str) -> Path:
        return self._folder / f"{_short(of)}-{made_of}-{self._code}.{self._kind}"


def made_by(code: Iterable[Path]) -> str:
    """Other code needs other texts: what they hold may mean something else to it."""
    return _short(b"".join(file.read_bytes() for file in code))


def hash_of(text: bytes) -> str:
    """Of some hundred megabytes in a moment."""
    return xxhash.xxh3_128_hexdigest(text)


def _short(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]

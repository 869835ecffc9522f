"""Which files of records may hold what is searched, by the keys in each; these are kept, as most files do not."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from pydantic import TypeAdapter

from refgrid.records import derived, record
from refgrid.records.derived import Derived, hash_of
from refgrid.records.record import record_bytes

_KEY = re.compile(rb'"key": ?"([0-9a-f]+)"')
_TOLERANCE = re.compile(rb'"tolerance": ?"([^"]*)"')
_TAKEN = re.compile(rb'"evidence": ?"')  # a run's name; the evidence against a sampler is a number

# The files of what finds and keeps keys.
CODE = tuple(Path(each) for each in (__file__, derived.__file__, record.__file__))
_Keys = list[tuple[str, list[str]]]  # by the tolerance that they were measured with, as far as lines tell it
_KEYS = TypeAdapter(_Keys)


class Searched:
    """Files of records, whose keys are kept in a folder."""

    def __init__(self, folder: Path) -> None:
        self._kept = Derived(folder, "keys", CODE)

    def may_hold(self, file: Path, wanted: Collection[bytes], tolerance: bytes) -> bool:
        """Whether a line of the file `is_wanted`; a file that cannot be read has none."""
        try:
            made_of = hash_of(file.read_bytes())
        except OSError:
            return False
        found = self._kept.read(str(file), made_of, _KEYS.validate_json)
        if found is None:
            found = _keys(file)
            self._kept.keep(str(file), made_of, _KEYS.dump_json(found))
        asked = {key.decode() for key in wanted}
        return any(told not in ("", tolerance.decode()) or not asked.isdisjoint(keys) for told, keys in found)


def lines(file: Path) -> list[bytes]:
    """None of a file that has gone since the folder was looked at, and none that cannot be read: both prove nothing."""
    try:
        return record_bytes(file).split(b"\n")
    except OSError:
        return []


def is_wanted(line: bytes, wanted: Collection[bytes] | None, tolerance: bytes) -> bool:
    """Whether it has one of the keys, or was measured with another tolerance; any key, where none is wanted.

    What took its evidence from another run is none itself.
    """
    key = _measured_key(line)
    if key is None:
        return False
    return wanted is None or key in wanted or _tolerance(line) not in (b"", tolerance)


def _keys(file: Path) -> _Keys:
    found: dict[bytes, list[str]] = defaultdict(list)
    for line in lines(file):
        if key := _measured_key(line):
            found[_tolerance(line)].append(key.decode())
    return [(tolerance.decode(), keys) for tolerance, keys in found.items()]


def _measured_key(line: bytes) -> bytes | None:
    key = _KEY.search(line)
    return None if key is None or _TAKEN.search(line) else key[1]


def _tolerance(line: bytes) -> bytes:
    """Empty where the line tells none: whoever died could not say."""
    found = _TOLERANCE.search(line)
    return found[1] if found else b""

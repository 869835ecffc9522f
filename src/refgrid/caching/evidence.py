"""Evidence: for each case the newest outcome in the records that was measured under the key that the case has today.

Records are searched as bytes and parsed only where a key fits, since most lines of most files belong to other machines.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refgrid.caching.key import Keys
from refgrid.caching.room import had_all, is_lack
from refgrid.caching.searched import Searched, is_wanted, lines
from refgrid.dataset.case import Case
from refgrid.records.record import Outcome, Verdict, record_paths

# Not proven, but decided by what is in the key: nothing that has not changed can become available.
_DECIDED = frozenset({Verdict.MISSING, Verdict.UNSUPPORTED, Verdict.API_ABSENT, Verdict.NO_GROUND_TRUTH})
# Whoever died could not say under which tolerance.
DIED = frozenset({Verdict.CRASH, Verdict.HANG})

_RUN = re.compile(rb'^\{"type": ?"run"')


@dataclass(frozen=True)
class Bounds:
    """Of memory, in bytes: what a worker was told to take at most, and what it has in any case."""

    memory: float = math.inf
    room: float = math.inf


@dataclass(frozen=True)
class Evidence:
    """One recorded outcome with the run that it is of; `parts` are all parts of its key."""

    case: str
    verdict: Verdict
    reason: str
    run: str
    started: str
    hashes: Mapping[str, str]
    parts: Mapping[str, str] = field(default_factory=dict)
    shrunk: bool = False

    @property
    def tolerance(self) -> str:
        """The tolerance it was measured with."""
        return self.hashes["tolerance"]

    def stands(self, bounds: Bounds, known: Collection[Verdict]) -> bool:
        """Whether it need not be measured again as long as its key is the same.

        A match stands, and so does what the key alone decides. `known` are the failures that are expected of the case,
        by its key: an expected mismatch stands, which was measured twice before it was told; whoever died, ran out of
        memory or differed from itself may do otherwise next time. What was left out for want of memory stands where it
        had as much as a worker now has in any case, and what was cut where a bound that was set was the reason.
        """
        if self.verdict is Verdict.NOT_RUN:
            return had_all(self.reason, bounds.room)
        if self.shrunk and math.isinf(bounds.memory):
            return False
        if self.verdict is Verdict.EXPECTED:
            return set(known) == {Verdict.MISMATCH}
        return self.verdict is Verdict.MATCH or self.verdict in _DECIDED

    def outcome(self, case: Case, key: str) -> Outcome:
        """What a run that finds it records: a match is `cached`, and what decided the rest is told again."""
        told = f"unchanged since it was {self.verdict.value} in run {self.run} of {self.started[:10]}"
        cached = self.verdict is Verdict.MATCH
        verdict = Verdict.CACHED if cached else self.verdict
        kept = {name: self.hashes[name] for name in ("reference", "tolerance") if name in self.hashes}
        return Outcome(case, verdict, told if cached else self.reason, hashes={**kept, "key": key}, evidence=self.run)


def record_files(folders: Iterable[Path]) -> list[Path]:
    """The files of records in these folders, with their subfolders, each once."""
    return sorted({file.resolve() for folder in folders for file in record_paths(folder)})


def standing(
    files: Iterable[Path], keys: Keys, cases: Collection[Case], tolerance: str, bounds: Bounds, searched: Searched
) -> dict[str, dict[str, Evidence]]:
    """What need not be measured again, by case id and by the tolerance that it was measured with.

    The newest outcome under a key decides, whatever it is: a match that has failed since is none.
    """
    by_id = {case.id: case for case in cases}
    wanted = {keys.key(case, tolerance).encode() for case in cases}
    newest: dict[str, dict[str, Evidence]] = {}
    holding = (file for file in files if searched.may_hold(file, wanted, tolerance.encode()))
    for each in _measured(holding, wanted, tolerance.encode()):
        case = by_id.get(each.case)
        if case is None or each.hashes["key"] != keys.key(case, each.tolerance):
            continue
        of_case = newest.setdefault(each.case, {})
        if each.tolerance not in of_case or of_case[each.tolerance].started <= each.started:
            of_case[each.tolerance] = each
    stands = {name: _stands(found, bounds, keys.failures_known(by_id[name])) for name, found in newest.items()}
    return {case_id: found for case_id, found in stands.items() if found}


def newest_match(files: Iterable[Path], case_ids: Collection[str]) -> dict[str, Evidence]:
    """The newest match with a key of each case, under whatever key: what a miss is explained by."""
    found: dict[str, Evidence] = {}
    for each in _measured(files):
        if each.verdict is Verdict.MATCH and each.case in case_ids:
            before = found.get(each.case)
            if before is None or before.started <= each.started:
                found[each.case] = each
    return found


def _stands(found: Mapping[str, Evidence], bounds: Bounds, known: Collection[Verdict]) -> dict[str, Evidence]:
    died = max((each.started for each in found.values() if each.verdict in DIED), default="")
    kept = {name: each for name, each in found.items() if each.started > died}
    return {name: each for name, each in kept.items() if each.stands(bounds, known)}


def _measured(
    files: Iterable[Path], wanted: Collection[bytes] | None = None, tolerance: bytes = b""
) -> Iterator[Evidence]:
    """Outcomes that were measured and have a key: one of those wanted, or of another tolerance; all where none is.

    Those of a soak are none.
    """
    for file in files:
        first, header = b"", dict[str, Any]()
        for line in lines(file):
            if _RUN.match(line):
                first, header = line, {}  # parsed when a line of its run is wanted: it names every case
            elif is_wanted(line, wanted, tolerance):
                header, outcome = header or _parsed(first), _parsed(line)
                if header and outcome.get("type") == "outcome" and not (header.get("soak") or _had_no_turn(outcome)):
                    yield _evidence(outcome, header)


def _had_no_turn(outcome: Mapping[str, Any]) -> bool:
    """Not-run for another reason than that the case needs more memory than there is."""
    return outcome.get("verdict") == Verdict.NOT_RUN.value and not is_lack(str(outcome.get("reason", "")))


def _parsed(line: bytes) -> dict[str, Any]:
    """What cannot be read is no evidence; the matrix says which line it is."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _evidence(outcome: Mapping[str, Any], header: Mapping[str, Any]) -> Evidence:
    hashes = outcome["hashes"]
    return Evidence(
        outcome["case"],
        Verdict(outcome["verdict"]),
        outcome.get("reason", ""),
        header["run"],
        header["started"],
        hashes,
        {**header.get("parts", {}), **hashes},
        bool(outcome.get("shrunk")),
    )

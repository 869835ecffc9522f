"""How long each case will take, so that the longest can begin first: as earlier records tell, else by its op or size.

Of the records only names and seconds are read: a run's workers wait for whoever reads them, and to check and keep all
that they hold takes four times as long.
"""

from __future__ import annotations

import json
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refgrid.dataset.case import Case
from refgrid.records.record import RecordError, Verdict, lines_of, record_bytes, record_paths
from refgrid.running.units import unit_of

# Where nothing was ever measured, only the order matters.
_SECONDS_PER_BYTE = 1e-9


@dataclass
class _Ran:
    """One run of the records: its environment, when it started, and what each of its cases took."""

    environment: str
    started: str
    seconds: dict[str, float] = field(default_factory=dict)


def known_seconds(folders: Iterable[Path], environment: str, device: str) -> dict[str, float]:
    """What each case took when it last ran on a kind of device, by case id: in this environment, else in any other.

    Raises RecordError for records that cannot be read.
    """
    ran = [run for folder in folders for path in record_paths(folder) for run in _on_device(path, device)]
    found: dict[str, float] = {}
    for run in sorted(ran, key=lambda run: (run.environment == environment, run.started)):
        found.update(run.seconds)
    return found


def _on_device(path: Path, device: str) -> Iterator[_Ran]:
    """The runs of one file on a kind of device; a file without any is not looked at line by line."""
    named = rb'"device": ?' + re.escape(json.dumps(device).encode())
    try:
        if not re.search(named, record_bytes(path)):
            return
    except OSError as error:
        raise RecordError(f"{path}: records cannot be read: {error.strerror or error}") from error
    run: _Ran | None = None
    for number, kind, told, _ in lines_of(path):
        try:
            if kind == "run":
                where = told["environment"]
                run = _Ran(where["name"], told["started"]) if where["device"] == device else None
                if run:
                    yield run
            elif kind == "outcome" and run:
                run.seconds.update(_seconds(told))
        except (LookupError, TypeError, AttributeError) as error:
            raise RecordError(f"{path}:{number}: is no record: {error!r}") from error


def _seconds(outcome: Mapping[str, Any]) -> dict[str, float]:
    """Of one case; one that did not run here, as its outcome stood already, took none."""
    spent = outcome.get("seconds")
    return {outcome["case"]: sum(spent.values())} if spent and outcome["verdict"] != Verdict.CACHED.value else {}


def estimates(
    cases: Sequence[Case], known: Mapping[str, float], bytes_needed: Callable[[Case], float]
) -> dict[str, float]:
    """Seconds of each case: as measured, else the median of its op, else by the bytes that it needs."""
    by_op: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        if case.id in known:
            by_op[case.op].append(known[case.id])
    medians = {op: statistics.median(seconds) for op, seconds in by_op.items()}
    unknown = [case for case in cases if case.id not in known and case.op not in medians]
    sizes = _once_a_unit(unknown, bytes_needed)
    rate = _seconds_per_byte([case for case in cases if case.id in known], known, bytes_needed) if unknown else 0.0
    guess = {case.id: sizes[unit_of(case)] * rate for case in unknown}
    return {case.id: known.get(case.id, guess.get(case.id, medians.get(case.op, 0.0))) for case in cases}


def _seconds_per_byte(
    cases: Sequence[Case], known: Mapping[str, float], bytes_needed: Callable[[Case], float]
) -> float:
    sizes = _once_a_unit(cases, bytes_needed)
    total = sum(sizes[unit_of(case)] for case in cases)
    return sum(known[case.id] for case in cases) / total if total else _SECONDS_PER_BYTE


def _once_a_unit(cases: Sequence[Case], bytes_needed: Callable[[Case], float]) -> dict[Hashable, float]:
    first = {unit_of(case): case for case in cases}
    return {unit: bytes_needed(case) for unit, case in first.items()}

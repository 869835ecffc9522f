"""What committed records say of a library's error, where no calibration has run: enough to tighten a few rows.

A comparison keeps the atol that it needed beside its rtol. An older one kept only its largest error M and its headroom
h under an atol and an rtol: every error is at most M, and at most h (atol + rtol |expected|). So with rtol as it was an
atol of min(M, h atol) is met for certain; of a smaller one nobody can say.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

from refgrid.calibration.derive import Row, rounded_up
from refgrid.calibration.rounding import UNIT, least_rtol
from refgrid.dataset.definition import DataSet
from refgrid.proving.tolerance import Tolerance, looser, tolerance_for, uncalibrated
from refgrid.records.record import Outcome, Run
from refgrid.running.units import Unit, unit_of

MARGIN = 2  # times what the records need: they hold one draw of each size
WORTH = 0.8  # of what is allowed: a row that is hardly tighter is not written
_ROUNDED_TO_NOTHING_LESS = ("float32", "float64")


@dataclass
class Seen:
    """The most that records need of one truth and output: atol with rtol as it is, headroom, and of a row's norm."""

    atol: float = 0.0
    headroom: float = 0.0
    row: float = 0.0
    met_atol: float = 0.0  # of what matched under a calibrated row
    met_rtol: float = 0.0
    comparisons: int = 0
    measured: int = 0  # comparisons of which the atol that they need is known, and not only that no more is needed
    runs: set[str] = field(default_factory=set)


def comparisons(run: Run, dataset: DataSet) -> Iterator[tuple[Outcome, str, str, Mapping[str, Any]]]:
    """Of each outcome that compared numbers with the table's tolerance: the outcome, output, dtype and comparison."""
    for outcome in run.outcomes.values():
        definition = dataset.definitions.get(outcome.case.definition)
        if definition is None or outcome.hashes.get("tolerance", "table") != "table":
            continue
        for comparison in outcome.comparisons:
            spec = definition.outputs.get(comparison["output"])
            if spec and spec.dtype in UNIT and not comparison["nonfinite_mismatches"]:
                yield outcome, comparison["output"], spec.dtype, comparison


def green_under(comparison: Mapping[str, Any], tolerance: Tolerance) -> bool:
    """Whether the record proves that the comparison would match under another tolerance, rows left aside."""
    if _needed(comparison) <= tolerance.atol and float(comparison["rtol"]) <= tolerance.rtol:
        return True
    most, share = float(comparison["max_abs_error"]), float(comparison["headroom"])
    kept, rtol = float(comparison["atol"]), float(comparison["rtol"])
    return most <= tolerance.atol or (share * kept <= tolerance.atol and share * rtol <= tolerance.rtol)


def _needed(comparison: Mapping[str, Any]) -> float:
    """The atol that it needed beside its rtol; nan of an older record."""
    return float(comparison.get("needed_atol", math.nan))


def seen(runs: Iterable[Run], dataset: DataSet) -> dict[tuple[str, str, str, str], Seen]:
    """By truth, op, dtype and output; of matches with the reference only.

    What two truths differ by says nothing of either: the less precise one may be as far from every other. That they
    still agree under rows that each earned beside the reference is for `contradicted` to find.
    """
    found: dict[tuple[str, str, str, str], Seen] = defaultdict(Seen)
    for run in runs:
        device = run.header.environment.device
        for outcome, output, dtype, comparison in comparisons(run, dataset):
            case = outcome.case
            if case.source and outcome.verdict.value == "match" and device == "cuda":
                _take(found, (f"{case.source} on {device}", case.op, dtype, output), comparison, run)
    return found


def _take(
    found: dict[tuple[str, str, str, str], Seen],
    key: tuple[str, str, str, str],
    comparison: Mapping[str, Any],
    run: Run,
) -> None:
    """Keep apart of what a calibrated row let match that it needs no more than that row: doubled, it would grow.

    What is known to be needed does not grow each time.
    """
    truth, op, dtype, output = key
    allowed = uncalibrated(op, dtype, output, truth)
    atol, rtol, share = (float(comparison[name]) for name in ("atol", "rtol", "headroom"))
    under_its_limit = (atol, rtol) == (allowed.atol, allowed.rtol)
    kept, needed, most = found[key], _needed(comparison), min(float(comparison["max_abs_error"]), share * atol)
    # Beside another rtol something else is needed, and of what is rounded to nothing less rtol shrinks, too.
    is_known = not math.isnan(needed) and rtol == allowed.rtol and dtype not in _ROUNDED_TO_NOTHING_LESS
    if is_known or under_its_limit:
        kept.atol = max(kept.atol, needed if is_known else most)
        kept.headroom = max(kept.headroom, share if under_its_limit else 0.0)
    else:
        kept.met_atol, kept.met_rtol = max(kept.met_atol, most), max(kept.met_rtol, share * rtol)
    if comparison.get("rows"):
        kept.row = max(kept.row, float(comparison["rows"]["error"]))
    kept.comparisons += 1
    kept.measured += is_known
    kept.runs.add(f"{run.header.environment.title}, {run.header.started[:10]}")


def tightened(found: Mapping[tuple[str, str, str, str], Seen]) -> Iterator[Row]:
    """The rows that records prove to be met with room to spare."""
    for key, each in sorted(found.items()):
        truth, op, dtype, output = key
        allowed = uncalibrated(op, dtype, output, truth)
        proven = _proven(key, each)
        if 0 < proven.atol <= WORTH * allowed.atol:
            told = f"{each.comparisons} comparisons in {', '.join(sorted(each.runs))}"
            yield Row(*key, proven.atol, proven.rtol, None, each.atol, None, None, None, allowed.atol, told)


def widened(row: Row, each: Seen | None) -> Row:
    """A row of draws, which are small, made as wide as records of all sizes need; never wider than tolerance.toml."""
    if each is None:
        return row
    proven = _proven((row.truth, row.op, row.dtype, row.output), each)
    row_norm = None if row.row_norm is None else max(row.row_norm, rounded_up(MARGIN * each.row))
    atol = max(row.atol, min(max(proven.atol, rounded_up(each.met_atol)), row.allowed))
    most = uncalibrated(row.op, row.dtype, row.output, row.truth).rtol
    rtol = max(row.rtol, min(max(proven.rtol, rounded_up(each.met_rtol)), most))
    if (atol, rtol, row_norm) == (row.atol, row.rtol, row.row_norm):
        return row
    need = "need" if each.measured == each.comparisons else "may need"
    told = f"{row.provenance}; as wide as {each.comparisons} comparisons in {', '.join(sorted(each.runs))} {need}"
    return replace(row, atol=atol, rtol=rtol, row_norm=row_norm, provenance=told)


def _proven(key: tuple[str, str, str, str], each: Seen) -> Tolerance:
    """What the records meet with a margin."""
    truth, op, dtype, output = key
    allowed = uncalibrated(op, dtype, output, truth)
    if dtype not in _ROUNDED_TO_NOTHING_LESS:
        return Tolerance(rounded_up(MARGIN * each.atol), allowed.rtol)
    # Nothing is rounded to less, so rtol shrinks alike.
    atol = rounded_up(max(MARGIN * each.headroom * allowed.atol, UNIT[dtype] / 1000))
    return Tolerance(atol, min(allowed.rtol, max(rounded_up(MARGIN * each.headroom * allowed.rtol), least_rtol(dtype))))


def contradicted(runs: Iterable[Run], dataset: DataSet) -> list[str]:
    """Matches in records of which it is not proven that the table of today would let them match, in words.

    A case of a source is held to that source's row, two sources that agreed to the looser of theirs.
    """
    return [
        f"{outcome.case.id}: {output} has headroom {comparison['headroom']} of atol {comparison['atol']}"
        for run in runs
        if run.header.environment.device == "cuda"
        for outcome, output, dtype, comparison, sides in _held(run, dataset)
        if not green_under(comparison, _bound(outcome.case.op, dtype, output, sides))
    ]


def _bound(op: str, dtype: str, output: str, sides: Iterable[str]) -> Tolerance:
    return reduce(looser, (tolerance_for(op, dtype, output, f"{side} on cuda") for side in sides))


def _held(run: Run, dataset: DataSet) -> Iterator[tuple[Outcome, str, str, Mapping[str, Any], tuple[str, ...]]]:
    """Each comparison of a match with the sources that it was between.

    An agreement does not name them: it holds the first source that gave something against each other one, in the order
    of the plan, output by output.
    """
    gave: dict[Unit, dict[str, set[str]]] = defaultdict(dict)
    for case in run.header.planned:
        outcome = run.outcomes.get(case.id)
        if case.source and outcome and outcome.comparisons:
            gave[unit_of(case)][case.source] = {each["output"] for each in outcome.comparisons}
    places: Counter[tuple[str, str]] = Counter()
    for outcome, output, dtype, comparison in comparisons(run, dataset):
        case = outcome.case
        if outcome.verdict.value == "match":
            sides = (case.source,) if case.source else _pairs(gave[unit_of(case)], output)[places[case.id, output]]
            places[case.id, output] += 1
            yield outcome, output, dtype, comparison, sides


def _pairs(gave: Mapping[str, set[str]], output: str) -> list[tuple[str, ...]]:
    first, *others = gave
    return [(first, other) for other in others if output in gave[first] & gave[other]]

"""The table of tolerances from measurements: one row a truth, never looser than what tolerance.toml allows it.

What the reference and a truth differ by, at most, over all draws is what is needed. A row allows eight times that, but
not more than the three-way bound where the truth keeps it: the reference's own error, and twice the error of the same
formula in the library's dtype; rounding is in rtol. What needs more than tolerance.toml allows is a failure of the
calibration, not a looser row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refgrid.calibration.rounding import FLOAT64, FORMULA, REFERENCE, UNIT, least_rtol
from refgrid.proving.tolerance import Tolerance, uncalibrated

MARGIN = 8  # times what was needed; other sizes and draws need more than those that were measured
WIDE = 10  # times the rtol of two roundings, in float32, whose sums are off by more than their last rounding
LEAST = 32  # parts of a rounding: an atol that no 16-bit output falls below, since larger sums are off by more
ROW_MARGIN = 2  # a row's error is a mean over its numbers, and varies less
TAIL = 8  # times the median draw: beyond it a row's norm can be anything, and more draws need any share of it


@dataclass(frozen=True)
class Row:
    """A derived tolerance with what it follows from; `allowed` is what tolerance.toml has for this truth.

    `needed` is the atol beside rtol, and `row_needed` the share of a row's norm, by which the reference and the truth
    differ; `error` is the truth's own from float64, `three_way` what the bound of that name allows of it.
    """

    truth: str
    op: str
    dtype: str
    output: str
    atol: float
    rtol: float
    row_norm: float | None
    needed: float
    row_needed: float | None
    error: float | None
    three_way: float | None
    allowed: float
    provenance: str

    @property
    def holds(self) -> bool:
        """Whether what was measured is within."""
        return self.needed <= self.atol and (self.row_norm is None or (self.row_needed or 0.0) <= self.row_norm)

    @property
    def keeps_three_way(self) -> bool:
        """Whether the truth is no further off than twice the same formula in its dtype; True where nobody knows."""
        return self.error is None or self.three_way is None or self.error <= self.three_way

    def to_dict(self) -> dict[str, Any]:
        """As a line of tolerance.json."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def derived(measurement: Mapping[str, Any], left: Collection[tuple[str, str]] = ()) -> Iterator[Row]:
    """The rows of one environment's measurement, but for those ops and truths that are left out."""
    environment = measurement["environment"]
    found = {
        tuple(row[name] for name in ("op", "dtype", "output", "who", "against")): row for row in measurement["measured"]
    }
    for (op, dtype, output, who, against), pair in found.items():
        if who != REFERENCE or against == FLOAT64 or (op, against) in left:
            continue
        parties = [found[op, dtype, output, each, FLOAT64] for each in (REFERENCE, FORMULA, against)]
        truth = f"{against} on {environment['device']}"
        told = f"{pair['draws']} draws in {environment['name']}, {measurement['date'][:10]}"
        yield _row((truth, op, dtype, output), pair, parties, told)


def _row(
    key: tuple[str, str, str, str], pair: Mapping[str, Any], parties: Sequence[Mapping[str, Any]], told: str
) -> Row:
    truth, op, dtype, output = key
    allowed = uncalibrated(op, dtype, output, truth)
    rtol, beyond = allowed.rtol, "beyond_kept"
    if dtype == "float32" and WIDE * least_rtol(dtype) <= allowed.rtol and pair["beyond_least"][-1] <= allowed.atol:
        rtol, beyond = rounded_up(WIDE * least_rtol(dtype)), "beyond_least"
    needed, floor = pair[beyond][-1], UNIT[dtype] / LEAST
    reference, formula, library = (party["beyond_rounding"][-1] for party in parties)
    three_way = reference + 2 * formula
    asked = MARGIN * needed if library > 2 * formula else min(MARGIN * needed, max(three_way, 2 * needed))
    atol = min(allowed.atol, rounded_up(max(asked, floor)))
    row_norm, row_needed = _row_norm(dtype, pair, allowed)
    if row_norm is None and row_needed is not None:
        told = f"{told}; rows cancel: {row_needed:g} of a norm at most, {pair['row'][0]:g} in the median"
    return Row(*key, atol, rtol, row_norm, needed, row_needed, library, 2 * formula, allowed.atol, told)


def _row_norm(dtype: str, pair: Mapping[str, Any], allowed: Tolerance) -> tuple[float | None, float | None]:
    """Rows are bounded in dtypes whose rounding hides a factor element by element; one rounding is the least.

    What tolerance.toml has for the truth was measured at all sizes, and stands. Where a library rounds terms that may
    cancel in a whole row, its error stays as large as ever beside a norm of nearly nothing: no draws bound that share.
    """
    if pair["row"] is None or UNIT[dtype] < UNIT["float16"] or allowed.required_matched_ratio < 1:
        return None, None
    median, *_, needed = pair["row"]
    if allowed.row_norm is not None:
        return allowed.row_norm, needed
    if needed > TAIL * max(median, UNIT[dtype]):
        return None, needed
    return rounded_up(max(ROW_MARGIN * needed, UNIT[dtype])), needed


def rounded_up(value: float) -> float:
    """To one significant digit: a table's numbers are read by people."""
    if value == 0:
        return 0.0
    power = math.floor(math.log10(value))
    digit = math.ceil(round(value / 10.0**power, 9))
    return float(f"{digit}e{power}")


def failures(rows: Iterable[Row]) -> list[str]:
    """What was measured beyond what its row allows, in words."""
    return [
        f"{row.truth}, {row.op}, {row.output} ({row.dtype}): needs atol {row.needed:g} beside rtol {row.rtol:g} "
        f"but tolerance.toml allows {row.allowed:g}"
        for row in rows
        if not row.holds
    ]

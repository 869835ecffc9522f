"""Holds one tensor against another and raises nothing but bad questions: the answer is a Comparison.

`actual` is the reference under test, `expected` the ground truth; non-finite values must agree position by position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from refgrid.proving.measure import measure
from refgrid.proving.rows import RowError, furthest_row, index_of
from refgrid.proving.tolerance import Tolerance

_NAMED = 8  # rows of a report


class ComparisonError(ValueError):
    """The tensors cannot be compared: names what differs and what it should be."""


class EmptyComparison(ComparisonError):
    """Nothing to compare: an empty comparison proves nothing."""


@dataclass(frozen=True)
class Location:
    """One element: its multi-dimensional index, both values and the error between them."""

    index: tuple[int, ...]
    actual: float
    expected: float
    error: float


@dataclass(frozen=True)
class Comparison:
    """What was measured for one output.

    The error of an element is |actual - expected|; equal non-finite values have none, disagreeing ones an infinite
    one. Relative errors divide by |expected| and leave out elements whose expected value is 0. Maxima are over all
    elements; means, mse and cosine over those finite on both sides; nan says that there were none.
    `headroom` is the largest error divided by what was allowed at its element: 1 is the bound, inf an error where none
    was allowed. `worst` holds the largest errors, those outside the tolerance before all others, the first index first
    among equals. Whole numbers and booleans must be equal, whatever the tolerance: their atol and rtol are 0.
    `rows` is the row that is furthest off as a whole, where the tolerance bounds rows; `headroom` knows of it too.
    `needed_atol` is the least atol under which, with this rtol, every element would match; nan if nobody measured it.
    """

    output: str
    count: int
    matched_ratio: float
    max_abs_error: float
    mean_abs_error: float
    max_rel_error: float
    mean_rel_error: float
    cosine: float
    mse: float
    headroom: float
    nonfinite_mismatches: int
    worst: tuple[Location, ...]
    atol: float
    rtol: float
    required_matched_ratio: float
    rows: RowError | None = None
    needed_atol: float = math.nan

    @property
    def matches(self) -> bool:
        """Enough elements are within the tolerance, no non-finite value disagrees, and no row is too far off."""
        return self._elements_match and (self.rows is None or self.rows.within)

    @property
    def _elements_match(self) -> bool:
        return self.matched_ratio >= self.required_matched_ratio and not self.nonfinite_mismatches

    def describe(self) -> str:
        """Thing, place, value, what it should be, and the bound, in one line."""
        if self.matches:
            return f"{self.output} matches ({self._bound()})"
        if self.rows is not None and self._elements_match:
            return f"{self.output}: {self.rows.describe()} ({self._bound()})"
        worst = self.worst[0]
        actual, expected = told_apart(worst.actual, worst.expected)
        odd = not (math.isfinite(worst.actual) and math.isfinite(worst.expected))
        found = f"is {actual} at {list(worst.index)}" if odd else f"is off at {list(worst.index)}: {actual}"
        return f"{self.output} {found} but should be {expected} ({self._bound()})"

    def lines(self) -> list[str]:
        """The report of an output that has a form of its own: rows, and what stands there, with both values."""
        told = [f"{self.output}: largest error {self.headroom:.4g} of what is allowed there; the worst:"]
        for worst in filter(lambda each: each.error != 0, self.worst):  # fewer may differ
            values = " but should be ".join(told_apart(worst.actual, worst.expected))
            told.append(f"  [row={worst.index[0]}, token={worst.index[1]}] is {values} (error {worst.error:.4g})")
        return told

    def _bound(self) -> str:
        share = math.floor(1e4 * self.matched_ratio) / 100  # rounded down: one bad element in a million is not 100%
        least = self.required_matched_ratio
        required = f" of {100 * least:g}% required" if least < 1 else ""
        return f"atol {_power(self.atol)}, rtol {_power(self.rtol)}; {share:g}% matched{required}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON; non-finite numbers are the strings nan, inf and -inf.

        Nine significant digits tell any two float32 values apart; the ratio keeps all, as the verdict rests on it.
        """
        return {**_plain(asdict(self)), "matched_ratio": self.matched_ratio}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Comparison:
        """The inverse of to_dict, up to its rounding."""
        known = {each.name for each in fields(Comparison)} - {
            "output",
            "worst",
            "rows",
        }  # a kind of its own may tell more
        numbers = {name: _number(value) for name, value in data.items() if name in known}
        worst = tuple(
            Location(tuple(row["index"]), *(_number(row[name]) for name in ("actual", "expected", "error")))
            for row in data["worst"]
        )
        return cls(output=data["output"], worst=worst, rows=RowError.from_dict(data.get("rows")), **numbers)


def compare(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Compare two tensors of one shape, dtype and device, elementwise and in float64.

    Raises ComparisonError when shape, dtype or device differ, EmptyComparison when there is no element.
    """
    for what in ("shape", "dtype", "device"):
        found, wanted = _told(getattr(actual, what)), _told(getattr(expected, what))
        if found != wanted:
            raise ComparisonError(f"{output}.{what} = {found}, but should be {wanted}")
    if actual.numel() == 0:
        raise EmptyComparison(f"{output} has no element (shape {list(actual.shape)}): nothing was compared")
    if not actual.is_floating_point():
        tolerance = Tolerance(0.0, 0.0, tolerance.required_matched_ratio)
    with torch.no_grad():
        found = _summary(output, actual, expected, tolerance)
        rows = None if tolerance.row_norm is None else furthest_row(actual, expected, tolerance.row_norm)
    return found if rows is None else replace(found, rows=rows, headroom=max(found.headroom, rows.headroom))


def _summary(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    found = measure(actual, expected, tolerance)
    total, largest = found.total, found.largest
    mismatches = int(total["nonfinite"])
    infinite = math.inf if mismatches else 0.0
    return Comparison(
        output=output,
        count=actual.numel(),
        matched_ratio=total["matched"] / actual.numel(),
        max_abs_error=max(largest["abs"], infinite),
        mean_abs_error=_mean(total["abs"], total["finite"]),
        max_rel_error=max(largest["rel"], infinite) if total["nonzero"] or mismatches else math.nan,
        mean_rel_error=_mean(total["rel"], total["nonzero"]),
        cosine=_cosine(total),
        mse=_mean(total["squares"], total["finite"]),
        headroom=max(largest["headroom"], infinite),
        nonfinite_mismatches=mismatches,
        worst=_locate(actual, expected, found.worst),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        required_matched_ratio=tolerance.required_matched_ratio,
        needed_atol=max(largest["beyond"] + tolerance.atol, infinite, 0.0),
    )


def _locate(actual: torch.Tensor, expected: torch.Tensor, worst: tuple[tuple[int, float], ...]) -> tuple[Location, ...]:
    found = []
    for place, error in worst:
        index = index_of(place, actual.shape)
        found.append(Location(index, actual[index].item(), expected[index].item(), error))
    return tuple(found)


def _mean(total: float, count: float) -> float:
    return total / count if count else math.nan


def _cosine(total: Mapping[str, float]) -> float:
    """1 for two zero vectors, which agree; 0 when only one is zero; nan when no element is finite on both sides."""
    if not total["finite"]:
        return math.nan
    if total["aa"] == 0 or total["ee"] == 0:
        return 1.0 if total["aa"] == total["ee"] else 0.0
    cosine = total["ae"] / math.sqrt(total["aa"]) / math.sqrt(total["ee"])
    return min(1.0, max(-1.0, cosine))


def _told(value: object) -> object:
    return list(value) if isinstance(value, torch.Size) else str(value).removeprefix("torch.")


def told_apart(actual: float, expected: float) -> tuple[str, str]:
    """Both as short as tells them apart: whole numbers in full, others with 6, 9 or 17 digits."""
    texts = [(str(actual), str(expected))]
    if isinstance(actual, float):
        texts = [(f"{actual:.{digits}g}", f"{expected:.{digits}g}") for digits in (6, 9, 17)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])


def told_rows(red: Sequence[int]) -> str:
    """As "0, 3, 7": the first few by their numbers, and how many more."""
    more = f" and {len(red) - _NAMED} more" if len(red) > _NAMED else ""
    return ", ".join(map(str, red[:_NAMED])) + more


def _power(value: float) -> str:
    """1e-3 rather than 0.001: tolerances are read by their exponent."""
    if value == 0 or value >= 1:
        return f"{value:g}"
    mantissa, exponent = f"{value:.5e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value

"""Holds one tensor against another and raises nothing but bad questions: the answer is a Comparison.

`actual` is the reference under test, `expected` the ground truth; non-finite values must agree position by position.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from refgrid.tolerance import Tolerance

CHUNK = 2**22  # elements compared at once in float64: 32 MiB a temporary
WORST = 5


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

    Errors are over elements that are finite on both sides; relative errors over those whose expected value is not 0.
    `headroom` is the largest error divided by what was allowed at that element: 1 is the bound. `worst` holds the
    largest errors, disagreeing non-finite values first.
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

    @property
    def matches(self) -> bool:
        """Enough elements are within the tolerance, and no non-finite value disagrees."""
        return self.matched_ratio >= self.required_matched_ratio and not self.nonfinite_mismatches

    def describe(self) -> str:
        """Thing, place, value, what it should be, and the bound, in one line."""
        worst = self.worst[0]
        odd = not (math.isfinite(worst.actual) and math.isfinite(worst.expected))
        verb = f"is {worst.actual:.6g} at" if odd else "is off at"
        value = "" if odd else f": {worst.actual:.6g}"
        bound = f"(atol {self.atol:g}, rtol {self.rtol:g}; {100 * self.matched_ratio:.4g}% matched)"
        return f"{self.output} {verb} {list(worst.index)}{value} but should be {worst.expected:.6g} {bound}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for strict JSON: six significant digits, non-finite numbers as the strings nan, inf, -inf."""
        return _plain(asdict(self))  # type: ignore[no-any-return]


def compare(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Compare two tensors of one shape, dtype and device, elementwise in float64.

    Raises ComparisonError when shape, dtype or device differ, EmptyComparison when there is no element.
    """
    for what in ("shape", "dtype", "device"):
        found, wanted = getattr(actual, what), getattr(expected, what)
        if found != wanted:
            raise ComparisonError(f"{output}.{what} = {_told(found)}, but should be {_told(wanted)}")
    if actual.numel() == 0:
        raise EmptyComparison(f"{output} has no element (shape {list(actual.shape)}): nothing was compared")
    parts = [_measure(*chunk, tolerance) for chunk in _chunks(actual, expected)]
    return _summary(output, actual, expected, torch.stack([sums for sums, _ in parts]), parts, tolerance)


_SUMS = ("matched", "nonfinite", "finite", "abs", "rel", "nonzero", "squares", "aa", "ee", "ae")
_MAXIMA = ("max_abs", "max_rel", "headroom")


def _measure(
    actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Sums and maxima of one chunk, and its worst elements; stays on the device."""
    a, e = actual.double(), expected.double()
    finite = a.isfinite() & e.isfinite()
    same = (a == e) | (a.isnan() & e.isnan())
    a0, e0 = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    error = (a0 - e0).abs()
    allowed = tolerance.atol + tolerance.rtol * e0.abs()
    ok = torch.where(finite, error <= allowed, same)
    # 0 / 0 is no error at all; an error where none is allowed has no headroom left
    headroom = torch.where(error > 0, error / allowed, 0.0)
    relative = torch.where(e0 != 0, error / e0.abs(), 0.0)
    sums = [ok, ~finite & ~same, finite, error, relative, e0 != 0, error * error, a0 * a0, e0 * e0, a0 * e0]
    totals = [value.sum(dtype=torch.float64) for value in sums]
    ranked = torch.where(finite | same, error, torch.inf).topk(min(WORST, error.numel()))
    return torch.stack([*totals, error.max(), relative.max(), headroom.max()]), (ranked.values, ranked.indices)


def _summary(
    output: str,
    actual: torch.Tensor,
    expected: torch.Tensor,
    table: torch.Tensor,
    parts: list[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]],
    tolerance: Tolerance,
) -> Comparison:
    split = len(_SUMS)
    total = dict(zip(_SUMS, table[:, :split].sum(0).tolist(), strict=True))
    largest = dict(zip(_MAXIMA, table[:, split:].amax(0).tolist(), strict=True))
    count, nonfinite = actual.numel(), int(total["nonfinite"])
    return Comparison(
        output=output,
        count=count,
        matched_ratio=total["matched"] / count,
        max_abs_error=largest["max_abs"],
        mean_abs_error=_mean(total["abs"], total["finite"]),
        max_rel_error=largest["max_rel"],
        mean_rel_error=_mean(total["rel"], total["nonzero"]),
        cosine=_cosine(total["ae"], total["aa"], total["ee"]),
        mse=_mean(total["squares"], total["finite"]),
        headroom=math.inf if nonfinite else largest["headroom"],
        nonfinite_mismatches=nonfinite,
        worst=_worst(actual, expected, [worst for _, worst in parts]),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        required_matched_ratio=tolerance.required_matched_ratio,
    )


def _worst(
    actual: torch.Tensor, expected: torch.Tensor, ranked: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[Location, ...]:
    errors = torch.cat([values for values, _ in ranked])
    flat = torch.cat([indices + CHUNK * number for number, (_, indices) in enumerate(ranked)])
    first = errors.topk(min(WORST, errors.numel()))
    places = flat[first.indices]
    a, e = (tensor.reshape(-1)[places].double().tolist() for tensor in (actual, expected))
    indices = torch.stack(torch.unravel_index(places, actual.shape), 1).tolist() if actual.dim() else [[]] * len(a)
    rows = zip(indices, a, e, first.values.tolist(), strict=True)
    return tuple(Location(tuple(index), *values) for index, *values in rows)


def _chunks(actual: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(actual.reshape(-1).split(CHUNK), expected.reshape(-1).split(CHUNK), strict=True)


def _mean(total: float, count: float) -> float:
    return total / count if count else 0.0


def _cosine(ae: float, aa: float, ee: float) -> float:
    """1 for two zero vectors, which agree; 0 when only one is zero."""
    if aa == 0 or ee == 0:
        return 1.0 if aa == ee else 0.0
    return ae / math.sqrt(aa) / math.sqrt(ee)


def _told(value: object) -> object:
    return list(value) if isinstance(value, torch.Size) else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value

"""Simple transforms that turn what should be into what is: a factor, a shift, another order, fewer bits.

A transform is said to explain errors only when, fitted, it brings every wrong element within the tolerance and leaves
at most a third of the error. So noise is explained by none, and neither are fewer than LEAST elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch

from refgrid.proving.tolerance import Tolerance

LEAST = 8
_LEFT = 1 / 3  # of the root mean square error
_NEARLY_ALL = 0.95  # one in a few thousand values lies so close to a rounded one that noise moves it past
_MOST_SLICES = 2048  # of an axis whose order is looked at
_SAMPLES = 256  # elements by which slices are told apart, before all of them are compared
# Relative size of a unit in the last place, at most.
_UNITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float8_e4m3fn: 2.0**-3}
_BASES = {
    math.log(2): "ln 2: base e where base 2 should be",
    1 / math.log(2): "log2(e): base 2 where base e should be",
}


@dataclass(frozen=True)
class Piece:
    """Values of one shape in float64, which of them are wrong, what its axes are called, and the output's dtype."""

    actual: torch.Tensor
    expected: torch.Tensor
    wrong: torch.Tensor
    axes: tuple[str, ...]
    tolerance: Tolerance
    dtype: torch.dtype


def within(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> torch.Tensor:
    """Elementwise; values that are not finite must be equal."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    finite = actual.isfinite() & expected.isfinite()
    return same | (finite & ((actual - expected).abs() <= tolerance.atol + tolerance.rtol * expected.abs()))


def explain(piece: Piece) -> str:
    """What explains all the wrong elements, as "a factor of 1.01"; empty if nothing simple does."""
    if int(piece.wrong.sum()) < LEAST:
        return ""
    return next((told for find in _FINDERS if (told := find(piece))), "")


def _holds(actual: torch.Tensor, guess: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> bool:
    if not within(actual, guess, tolerance).all():
        return False
    return _squares(actual, guess) <= _LEFT**2 * _squares(actual, expected)


def _squares(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the errors; infinite where one side alone is not finite."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (actual - expected).abs().nan_to_num(nan=torch.inf))
    return float(error.square().sum())


def _one_value(piece: Piece) -> str:
    values = piece.actual[piece.wrong]
    first = values[0].item()
    if first == 0 and not values.any():
        return "zeros, as where nothing was written"
    if values.isnan().all() or (values == first).all():
        return f"{first:.6g} at every place" if math.isnan(first) else f"one value at every place, {first:.6g}"
    return ""


def _factor_or_shift(piece: Piece) -> str:
    a, e = piece.actual[piece.wrong], piece.expected[piece.wrong]
    if not (a.isfinite() & e.isfinite()).all():
        return ""
    found = []
    factors = [float((a * e).sum() / e.square().sum()), float((a / e)[e != 0].median())] if e.any() else []
    if fitting := [c for c in factors if c != 0 and _holds(a, c * e, e, piece.tolerance)]:
        found.append(_told_factor(fitting[0]))
    shifts = [float((a - e).mean()), float((a - e).median())]
    if fitting := [c for c in shifts if _holds(a, e + c, e, piece.tolerance)]:
        found.append(f"a shift of {fitting[0]:.4g}")
    return " or ".join(found)  # both, where the values hardly differ


def _told_factor(factor: float) -> str:
    if abs(factor + 1) < 1e-3:
        return "a flipped sign"
    named = [told for base, told in _BASES.items() if abs(factor / base - 1) < 1e-3]
    return f"a factor of {factor:.4g}" + "".join(f", {told}" for told in named)


def _fewer_bits(piece: Piece) -> str:
    """Values that a smaller dtype holds, or that the output's own would hold if rounded, each next to its right one."""
    a, e = piece.actual, piece.expected
    if not (a.isfinite() & e.isfinite()).all():
        return ""
    for dtype, unit in _UNITS.items():
        near = (a - e).abs() <= unit * e.abs() + piece.tolerance.atol
        if not (near & (a.to(dtype).double() == a)).all():
            continue
        name = str(dtype).removeprefix("torch.")
        noise = piece.tolerance.rtol if piece.tolerance.rtol < unit / 4 else 0.0  # of values that the dtype holds
        differ = a != e
        toward_zero = differ & (a.abs() <= (1 + noise) * e.abs())
        if int(differ.sum()) >= 2 * LEAST and int(toward_zero.sum()) >= _NEARLY_ALL * int(differ.sum()):
            return f"truncation to {name}"
        if dtype != piece.dtype and int((e.to(dtype).double() != e).sum()) > e.numel() / 2:
            return f"rounding to {name}"
    return ""


def _transposed(piece: Piece) -> str:
    """Two axes exchanged, or the memory of one order read as that of the other."""
    for one, other in combinations([i for i, size in enumerate(piece.actual.shape) if size > 1], 2):
        guess = piece.expected.transpose(one, other).reshape(piece.expected.shape)
        if _holds(piece.actual, guess, piece.expected, piece.tolerance):
            return f"a transposition of {piece.axes[one]} and {piece.axes[other]}"
    return ""


def _another_order(piece: Piece) -> str:
    for axis, name in enumerate(piece.axes):
        if not 2 <= piece.actual.shape[axis] <= _MOST_SLICES:
            continue
        sides = (x.movedim(axis, 0) for x in (piece.actual, piece.expected, piece.wrong))
        a, e, wrong = (x.reshape(len(x), -1) for x in sides)
        places = wrong.any(1).nonzero()[:, 0]
        if e.shape[1] < LEAST and len(places) < LEAST:
            continue  # a few numbers are soon found among others
        origin = _nearest(a[places], e)
        if _holds(a[places], e[origin], e[places], piece.tolerance):
            return _told_order(name, places.tolist(), origin.tolist(), len(a))
    return ""


def _nearest(slices: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Of each slice, [n, elements], the number of the one in `among` that is most like it."""
    sample = torch.randperm(among.shape[1], generator=torch.Generator().manual_seed(0))[:_SAMPLES]
    one, other = (x[:, sample.to(x.device)].nan_to_num(nan=3.0, posinf=5.0, neginf=-7.0) for x in (slices, among))
    return torch.cdist(one, other).argmin(1)


def _told_order(axis: str, places: list[int], origin: list[int], size: int) -> str:
    if len(places) == 2 and origin == places[::-1]:
        return f"{axis} {places[0]} and {places[1]} exchanged"
    if all(place + source == size - 1 for place, source in zip(places, origin, strict=True)):
        return f"{axis} in reverse order"
    steps = {(place - source) % size for place, source in zip(places, origin, strict=True)}
    if len(steps) == 1 and len(places) > 2:
        step = steps.pop()
        around = len(places) == size
        step = step if step <= size // 2 else step - size
        return f"{axis} {'rotated' if around else 'moved'} by {step:+d}"
    kind = f"another order of {axis}" if sorted(places) == sorted(origin) else f"values of another {axis}"
    pairs = [f"{place} holds what {source} should" for place, source in zip(places, origin, strict=True)]
    return f"{kind}: {', '.join(pairs[:3])}{', ...' if len(pairs) > 3 else ''}"


# The first that explains all of it is told.
_FINDERS: tuple[Callable[[Piece], str], ...] = (_one_value, _factor_or_shift, _fewer_bits, _transposed, _another_order)

"""Who is off where two disagree, or far further than another where they agree: distances from the float64 formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from refgrid.proving.compare import Comparison, compare
from refgrid.proving.tolerance import Tolerance

Bound = Callable[[str, str], Tolerance]  # of a side's name and an output: how far it may be from the truth

# A match tells of a side that is more than so many times further from float64 than another.
FURTHER = 10


class Ruling(NamedTuple):
    """What float64 says, in words that are empty where it says nothing, and the sides beyond their tolerance of it."""

    told: str
    outliers: frozenset[str]


def settle(
    outputs: Collection[str],
    sides: Mapping[str, Mapping[str, torch.Tensor]],
    exact: Mapping[str, torch.Tensor],
    bound: Bound,
) -> Ruling:
    """What float64 says of outputs in which sides disagree."""
    rulings = [_rule(name, given, exact[name], bound) for name in outputs if (given := _giving(name, sides, exact))]
    return Ruling("; ".join(each.told for each in rulings), frozenset().union(*(each.outliers for each in rulings)))


class Held(NamedTuple):
    """One side's output against float64 that is rounded to the output's dtype, and the step of that dtype at 1."""

    side: str
    comparison: Comparison
    step: float


def hold(
    sides: Mapping[str, Mapping[str, torch.Tensor]], exact: Mapping[str, torch.Tensor], bound: Bound
) -> list[Held]:
    """Each side's outputs against float64."""
    found = []
    for name in exact:
        for side, tensor in _giving(name, sides, exact).items():
            comparison = compare(name, tensor, exact[name].to(tensor.dtype), bound(side, name))
            found.append(Held(side, comparison, torch.finfo(tensor.dtype).eps))
    return found


def told_further(held: Collection[Held], exact: Mapping[str, torch.Tensor]) -> str:
    """Of sides that agree, output by output: who is yet far further from float64 than another; empty if nobody is.

    An error of no more than one step of the dtype at the output's largest number is nobody's fault.
    """
    told = []
    for name in exact:
        ranked = sorted((each for each in held if each.comparison.output == name), key=_distance)
        if ranked and _much_further(ranked[-1], ranked[0], exact[name]):
            told.append(told_errors(name, {each.side: _distance(each) for each in (ranked[-1], ranked[0])}))
    return "; ".join(told)


def _much_further(far: Held, near: Held, exact: torch.Tensor) -> bool:
    return _distance(far) > FURTHER * _distance(near) and _distance(far) > far.step * _largest(exact)


def _distance(held: Held) -> float:
    return held.comparison.max_abs_error


def _largest(exact: torch.Tensor) -> float:
    """The size of the largest finite number; a part at a time, as outputs may fill half of the memory."""
    parts = exact.flatten().split(2**22)
    return max(float(part.abs().nan_to_num(nan=0.0, posinf=0.0).max()) for part in parts)


def _giving(
    name: str, sides: Mapping[str, Mapping[str, torch.Tensor]], exact: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The sides' tensors of one output; none where float64 gives it in another form, as the law of a sample."""
    given = {side: tensors[name] for side, tensors in sides.items() if name in tensors and tensors[name].numel()}
    fits = name in exact and all(
        tensor.is_floating_point() and tensor.shape == exact[name].shape for tensor in given.values()
    )
    return given if fits else {}


def _rule(name: str, given: Mapping[str, torch.Tensor], exact: torch.Tensor, bound: Bound) -> Ruling:
    """The furthest first, by how much further it is than the nearest, and who is beyond the tolerance."""
    errors = {side: _error(tensor, exact) for side, tensor in given.items()}
    ranked = sorted(errors, key=lambda side: -errors[side])
    held = {side: compare(name, given[side], exact.to(given[side].dtype), bound(side, name)) for side in ranked}
    beyond = [side for side in ranked if not held[side].matches]
    told = told_errors(name, {side: errors[side] for side in ranked})
    return Ruling(f"{told}{_beyond(beyond, ranked)}", frozenset(beyond))


def told_errors(name: str, ranked: Mapping[str, float]) -> str:
    """Errors of sides, the furthest first, and how much further it is than the last."""
    (first, most), *others = ranked.items()
    words = [f"{first}'s {name} is {most:.2g} from float64", *(f"{side}'s {error:.2g}" for side, error in others)]
    return f"{', '.join(words)}: {_factor(most, [*ranked.values()][-1])}"


def _factor(most: float, least: float) -> str:
    if most == least:
        return "equally far"
    if math.isinf(most):
        return "one of them is not finite where it should be, or the other way round"
    return f"{most / least:.3g} times further" if least else "the other is exact"


def _beyond(beyond: Collection[str], sides: Collection[str]) -> str:
    """Who disagrees with float64 too, by the tolerance of each."""
    if not beyond:
        return "; each is within its tolerance of it"
    if len(beyond) == len(sides):
        return "; none is within its tolerance of it"
    return f"; beyond its tolerance: {', '.join(beyond)}"


def _error(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest error; infinite where only one of the two is finite or they are different infinities."""
    wide = tensor.double()
    same = (wide == exact) | (wide.isnan() & exact.isnan())
    return float(torch.where(same, 0.0, (wide - exact).abs()).nan_to_num(nan=torch.inf).max())

"""Who is off where two disagree: each side's distance from the float64 formula, in words for the reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import torch

from refgrid.proving.compare import Comparison, compare
from refgrid.proving.tolerance import Tolerance

Bound = Callable[[str, str], Tolerance]  # of a side's name and an output: how far it may be from the truth


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


def off_from(
    sides: Mapping[str, Mapping[str, torch.Tensor]], exact: Mapping[str, torch.Tensor], bound: Bound
) -> list[Comparison]:
    """Each side's outputs against float64, rounded to their dtypes: those that do not match, one comparison each."""
    found = []
    for name in exact:
        for side, tensor in _giving(name, sides, exact).items():
            comparison = compare(name, tensor, exact[name].to(tensor.dtype), bound(side, name))
            found += [] if comparison.matches else [comparison]
    return found


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
    first, *others = ranked
    words = [f"{first}'s {name} is {errors[first]:.2g} from float64"]
    words += [f"{side}'s {errors[side]:.2g}" for side in others]
    held = {side: compare(name, given[side], exact.to(given[side].dtype), bound(side, name)) for side in ranked}
    beyond = [side for side in ranked if not held[side].matches]
    told = f"{', '.join(words)}: {_factor(errors[first], errors[ranked[-1]])}{_beyond(beyond, ranked)}"
    return Ruling(told, frozenset(beyond))


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

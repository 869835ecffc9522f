"""How far one tensor is from another, in the terms that a tolerance is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from refgrid.proving.rows import furthest_row


@dataclass(frozen=True)
class Distance:
    """The largest errors of one draw.

    `abs`: |actual - expected|; `rel`: that over |expected|, where it is not 0; `beyond`: the atol that is needed beside
    each of some rtols, by their names; `row`: a row's error over its norm, None where rows are too short.
    """

    abs: float
    rel: float
    beyond: Mapping[str, float] = field(default_factory=dict)
    row: float | None = None


def distance(actual: torch.Tensor, expected: torch.Tensor, rtols: Mapping[str, float]) -> Distance:
    """Both of one shape, of any float dtype; infinite where one is finite and the other is not."""
    a, e = actual.double(), expected.double()
    same = (a == e) | (a.isnan() & e.isnan())
    error = torch.where(same, 0.0, (a - e).abs()).nan_to_num(nan=torch.inf)
    size = torch.where(e.isfinite(), e.abs(), 0.0)
    relative = torch.where(size > 0, error / size, 0.0)
    beyond = {name: max(0.0, float((error - rtol * size).max())) for name, rtol in rtols.items()}
    rows = furthest_row(a, e, bound=1.0)
    return Distance(float(error.max()), float(relative.max()), beyond, rows.error if rows else None)

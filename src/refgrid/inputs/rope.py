"""Inputs of rotary embeddings: a table of cosines and sines, positions in no order."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from refgrid.inputs.drawing import Drawing, Value

BASE = 10_000.0
DIGITS = 6  # to which sines are rounded, so that no maths library differs in them


def cos_sin_cache(drawing: Drawing, name: str) -> Value:
    """Cosines of position / BASE^(2 i / rotary_dim), then the sines."""
    positions, rotary_dim = drawing.shape(name)
    return drawing.place(name, _table(positions, rotary_dim).to(drawing.float_dtype(name)))


def positions(drawing: Drawing, name: str) -> Value:
    """Any positions, repeated and unsorted, the last and the first among them."""
    count, most = drawing.shape(name)[0], drawing.axis(name, "max_seq_len")
    if count and not most:
        raise drawing.error(name, f"has {count} entries, but max_seq_len is 0: there is no position to name")
    drawn = torch.randint(max(1, most), (count,), generator=drawing.generator(name))
    drawn[:1], drawn[1:2] = most - 1, 0
    return drawing.place(name, drawn)


@cache
def _table(positions: int, rotary_dim: int) -> torch.Tensor:
    angles = [[p / BASE ** (2 * i / rotary_dim) for i in range(rotary_dim // 2)] for p in range(positions)]
    rows = [[round(f(a), DIGITS) for f in (math.cos, math.sin) for a in row] for row in angles]
    return torch.tensor(rows, dtype=torch.float64).view(positions, rotary_dim)

"""Inputs of rotary embeddings: positions in no order, and a table that is NaN where nobody looks."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

BASE = 5e6  # rope_theta of MiniMax-M2
# An angle is a whole number of 2^-32 turns, its cosine that of the next lower 2^-16 turn: whole numbers wrap alike
# everywhere, whereas the cosine of a large float differs from one maths library to another.
TURN, ANGLES = 2**32, 2**16
DIGITS = 6  # of a cosine, rounded so that no maths library differs in it


def positions(drawing: Drawing, name: str) -> Value:
    """Any positions, unsorted and repeated: the last and the first among them, and the last a second time."""
    count, most = drawing.shape(name)[0], drawing.axis(name, "max_seq_len")
    if count and not most:
        raise drawing.error(name, f"has {count} entries, but max_seq_len is 0: there is no position to name")
    drawn = torch.randint(max(1, most), (count,), generator=drawing.generator(name))
    drawn[:1], drawn[1:2], drawn[4:5] = most - 1, 0, most - 1
    return drawing.place(name, drawn.to(drawing.dtype(name)))


def cos_sin_cache(drawing: Drawing, name: str) -> Value:
    """Cosines of position / BASE^(2 i / rotary_dim), then the sines; NaN at positions that no token has."""
    most, rotary_dim = drawing.shape(name)
    table = torch.full((most, rotary_dim), torch.nan, dtype=drawing.float_dtype(name))
    used = drawing.known("positions", name).unique()
    frequency = [round(TURN / (2 * math.pi) * BASE ** (-2 * i / rotary_dim)) for i in range(rotary_dim // 2)]
    angle = used[:, None] * torch.tensor(frequency, dtype=torch.int64) % TURN // (TURN // ANGLES)
    table[used] = torch.cat([_cosines()[angle], _cosines()[angle - ANGLES // 4]], dim=1).to(table.dtype)
    return drawing.place(name, table)


@cache
def _cosines() -> torch.Tensor:
    """Cosines of whole 2^-16 turns, no zero of them negative; the sine is that of a quarter turn before."""
    rounded = [round(math.cos(2 * math.pi * angle / ANGLES), DIGITS) + 0.0 for angle in range(ANGLES)]
    return torch.tensor(rounded, dtype=torch.float64)

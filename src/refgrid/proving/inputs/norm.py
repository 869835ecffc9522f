"""Inputs of norms: rows of unit variance hide what is added to the mean of squares.

A workload whose uuid says `quiet` has rows of standard deviations from 2**-6 to 2**-14, on both sides of the root of
any model's eps: there a tenfold eps, or one outside the root, moves the output by a factor. Every other of them is off
centre by as much, so that a variance is no mean of squares.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs import plain

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

LOUDEST, STEP, LEVELS = -6, -2, 5  # powers of two, which scale a bfloat16 exactly


def rows(drawing: Drawing, name: str) -> Value:
    """Standard normal numbers, or, in a quiet workload, rows of one after the other of the levels."""
    if "quiet" not in drawing.workload.uuid:
        return plain.plain(drawing, name)
    shape = drawing.shape(name)
    row = torch.arange(shape[0])[:, None]
    drawn = torch.cat(list(drawing.numbers(name, shape[0] * shape[1]))).view(shape)
    level = torch.exp2((LOUDEST + STEP * (row % LEVELS)).float())
    return drawing.place(name, ((drawn.float() + row % 2) * level).to(drawn.dtype))

"""Inputs of no structure: normal numbers, scaled as trained weights are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs.normal import movable

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

# A weight of more numbers repeats its first ones. A prime: rows of one length are then distinct shifts of each other,
# so that a kernel which takes a wrong row, column or expert still gives wrong sums.
PERIOD = 2**24 - 3


def plain(drawing: Drawing, name: str) -> Value:
    """Standard normal numbers."""
    return normal_tensor(drawing, name)


def gemm_weight(drawing: Drawing, name: str) -> Value:
    """B [N, K] over sqrt(K), as trained weights are; a B of other rank is no gemm's and stays as drawn.

    Outputs are then of order one, so that a kernel which sums in float16 neither overflows nor rounds beyond reason.
    """
    shape = drawing.shape(name)
    return normal_tensor(drawing, name, shape[1] ** -0.5 if len(shape) == 2 and shape[1] else 1.0)


def normal_tensor(drawing: Drawing, name: str, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers with standard deviation `scale`, drawn in the input's dtype, hashed and placed."""
    shape = drawing.shape(name)
    count = math.prod(shape)
    if drawing.is_weight(name) and count > PERIOD:
        return repeated(drawing, name, _whole(drawing, name, PERIOD, scale))
    return drawing.place(name, _whole(drawing, name, count, scale).reshape(shape))


def _whole(drawing: Drawing, name: str, count: int, scale: float) -> torch.Tensor:
    whole, start = torch.empty(count, dtype=drawing.float_dtype(name)), 0
    for part in drawing.numbers(name, count, scale):
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def repeated(drawing: Drawing, name: str, drawn: torch.Tensor) -> torch.Tensor:
    """Drawn and hashed once a period, and repeated on the device: a weight can be larger than the machine's memory."""
    shape = drawing.shape(name)
    drawing.hash_head(name, shape)
    drawing.feed(drawn)
    count, length, period = math.prod(shape), len(drawn), movable(drawn).to(drawing.device)
    whole = count // length * length
    result = torch.empty(count, dtype=period.dtype, device=drawing.device)
    result[:whole].view(-1, length).copy_(period)
    result[whole:].copy_(period[: count - whole])
    return result.view(drawn.dtype).view(shape)

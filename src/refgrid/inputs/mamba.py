"""Inputs of selective state updates: one rate, step and skip a head, slots of a cache in no order."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from refgrid.inputs.drawing import Drawing, Value


def per_head(drawing: Drawing, name: str) -> Value:
    """Normal numbers, one a head (and token), repeated over what follows: kernels take broadcast views only."""
    shape, axes = drawing.shape(name), drawing.definition.inputs[name].shape or ()
    lead = shape[: axes.index("nheads") + 1]
    drawn = torch.cat(list(drawing.numbers(name, math.prod(lead)))).view(*lead, *[1] * (len(shape) - len(lead)))
    return drawing.place(name, drawn.expand(shape).contiguous())


def rates(drawing: Drawing, name: str) -> Value:
    """A from -1/256 to -16, one a head, in powers of two and between: states that last and states that go at once."""
    heads, *rest = drawing.shape(name)
    order = torch.randperm(heads, generator=drawing.generator(name)).double()
    power = (order / max(1, heads - 1) * 12 - 8).round()
    drawn = -torch.pow(torch.tensor(2.0, dtype=torch.float64), power)
    return drawing.place(name, drawn.to(drawing.float_dtype(name)).view(-1, 1, 1).expand(heads, *rest).contiguous())


def slots(drawing: Drawing, name: str) -> Value:
    """Distinct slots in no order; a workload whose uuid says `pad` has padding in every third place, the first too."""
    count, slots_ = drawing.shape(name)[0], drawing.axis(name, "state_cache_size")
    drawn = torch.randperm(slots_, generator=drawing.generator(name))[:count].to(torch.int32)
    if "pad" in drawing.workload.uuid:
        drawn[::3] = -1
    return drawing.place(name, drawn)


def states(drawing: Drawing, name: str) -> Value:
    """Normal numbers in the slots of the batch and NaN in all others, which are carried but never read."""
    shape, used = drawing.shape(name), drawing.known("state_batch_indices", name).long()
    used, width = used[used >= 0], math.prod(shape[1:])
    whole = torch.full(shape, torch.nan, dtype=drawing.float_dtype(name))
    for slot, part in zip(
        used.tolist(), drawing.numbers(name, len(used) * width, block=max(4, width // 4 * 4)), strict=True
    ):
        whole[slot] = part.view(shape[1:])
    return drawing.place(name, whole)

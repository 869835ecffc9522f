"""Inputs of selective state updates: decays from none to all, one number a head, slots of a cache in no order.

Models have one rate, step, bias and skip for all channels of a head, and kernels demand it. A workload whose uuid says
`channels` has them differ from number to number, as the shapes allow; one whose uuid says `pad` has padding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs import normal, plain

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

# -A: with a step of 1, from a state that lasts for a thousand tokens to one that is gone with the next.
RATES = (1e-3, 16.0)
# dt_bias: steps of softplus(dt + dt_bias) from 1/3000 to 2.
BIASES = (-8.0, 2.0)
# One step in so many clears the state and overwrites it, and one keeps all of it: both beyond the linear part.
EXTREME, CLEARS = 64, 32.0
INFLOW = 0.125  # of B, so that a step of CLEARS leaves states of the order of 1 too


def slots(drawing: Drawing, name: str) -> Value:
    """Distinct slots in an order of their own; with padding, every third sequence from the first on is."""
    count, most = drawing.shape(name)[0], drawing.axis(name, "state_cache_size")
    if count > most:
        raise drawing.error(name, f"names {count} slots, but the cache has {most}")
    drawn = torch.randperm(most, generator=drawing.generator(name))[:count]
    if "pad" in drawing.workload.uuid:
        drawn[::3] = -1
    return drawing.place(name, drawn.to(drawing.dtype(name)))


def states(drawing: Drawing, name: str) -> Value:
    """Normal numbers in the slots of the batch, NaN in all others: those are carried but neither read nor written."""
    shape, named = drawing.shape(name), drawing.known("state_batch_indices", name).long()
    whole = torch.full(shape, torch.nan, dtype=drawing.float_dtype(name))
    named, width = named[named >= 0], math.prod(shape[1:])
    drawn = drawing.numbers(name, len(named) * width, block=max(4, width // 4 * 4))
    flat = whole.view(shape[0], -1)
    for slot, part in zip(named.tolist(), drawn, strict=True):
        flat[slot] = part
    return drawing.place(name, whole)


def rates(drawing: Drawing, name: str) -> Value:
    """A: minus RATES, evenly spaced in the logarithm."""
    low, high = RATES
    heads = drawing.axis(name, "nheads")
    spaced = [round(low * (high / low) ** (head / max(1, heads - 1)), 6) for head in range(heads)]
    return _one_of(drawing, name, -torch.tensor(spaced, dtype=torch.float64))


def biases(drawing: Drawing, name: str) -> Value:
    """dt_bias evenly spaced, in whole 64ths."""
    heads = drawing.axis(name, "nheads")
    spaced = BIASES[0] + (BIASES[1] - BIASES[0]) * torch.arange(heads, dtype=torch.float64) / max(1, heads - 1)
    return _one_of(drawing, name, spaced.mul(64).round().div(64))


def steps(drawing: Drawing, name: str) -> Value:
    """dt: normal numbers, and some of CLEARS and of minus that."""
    own, dtype, generator = _own(drawing, name), drawing.float_dtype(name), drawing.generator(name)
    lot = torch.randint(EXTREME, (math.prod(own),), generator=generator)
    numbers = torch.cat([torch.empty(0, dtype=dtype), *normal.normal_numbers(len(lot), dtype, generator)])
    numbers[lot == 0], numbers[lot == 1] = CLEARS, -CLEARS
    return _spread_out(drawing, name, numbers.view(own))


def skips(drawing: Drawing, name: str) -> Value:
    """D: normal numbers."""
    own = _own(drawing, name)
    return _spread_out(drawing, name, torch.cat([*drawing.numbers(name, math.prod(own))]).view(own))


def inflow(drawing: Drawing, name: str) -> Value:
    """B: normal numbers of width INFLOW."""
    return plain.normal_tensor(drawing, name, INFLOW)


def readout(drawing: Drawing, name: str) -> Value:
    """C: normal numbers over sqrt(dstate), so that an output is of the order of a state."""
    return plain.normal_tensor(drawing, name, drawing.axis(name, "dstate") ** -0.5)


def _own(drawing: Drawing, name: str) -> tuple[int, ...]:
    """The shape of the numbers that differ: one a head (and sequence), or with `channels` all of them."""
    shape, axes = drawing.shape(name), drawing.definition.inputs[name].shape or ()
    if "channels" in drawing.workload.uuid:
        return shape
    lead = axes.index("nheads") + 1
    return (*shape[:lead], *[1] * (len(shape) - lead))


def _one_of(drawing: Drawing, name: str, values: torch.Tensor) -> Value:
    """Each head one of the values, no two the same; with `channels`, any of them anywhere."""
    own, generator = _own(drawing, name), drawing.generator(name)
    if own == drawing.shape(name):
        which = torch.randint(len(values), (math.prod(own),), generator=generator)
    else:
        which = torch.randperm(len(values), generator=generator)
    return _spread_out(drawing, name, values[which].to(drawing.float_dtype(name)).view(own))


def _spread_out(drawing: Drawing, name: str, own: torch.Tensor) -> Value:
    """In memory as in the definition, whoever wants a view of stride 0 makes it."""
    return drawing.place(name, own.expand(drawing.shape(name)).contiguous())

"""Inputs of the gated delta rule: unit keys, gates from none to all, ragged sequences, slots of a pool of states."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs import normal

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

# Lengths around a chunk of 64 tokens, several chunks, one token and none.
LENGTHS = (0, 1, 65, 64, 129, 63)
# A_log in steps of 1/32: rates of exp(A_log) = 0.5 to 16.
RATES = (-22, 88)
# dt_bias: from a state that lasts for thousands of tokens to one that is gone with the next.
BIASES = (-8.0, 2.0)
# One in so many inputs of a gate opens it fully, and one closes it.
EXTREME = 128


def unit_keys(drawing: Drawing, name: str) -> Value:
    """Rows of length 1: the rule forgets or blows up with other ones.

    Normal numbers rounded to whole multiples of 1/4096: sums of their squares are exact in float64, and square root and
    division are correctly rounded everywhere.
    """
    shape = drawing.shape(name)
    whole = (torch.cat([torch.empty(0), *drawing.numbers(name, math.prod(shape))]).double() * 4096).round()
    rows = whole.view(-1, shape[-1])
    length = rows.square().sum(dim=1, keepdim=True).clamp(min=1).sqrt()
    return drawing.place(name, (rows / length).to(drawing.float_dtype(name)).view(shape))


def decay_rates(drawing: Drawing, name: str) -> Value:
    """A_log from log 0.5 to log 16, evenly spaced, the heads in an order of their own."""
    return drawing.place(name, _spread(drawing, name, *RATES).round().div(32).to(drawing.float_dtype(name)))


def decay_bias(drawing: Drawing, name: str) -> Value:
    """dt_bias evenly spaced over the heads, in an order of its own: some states are carried over many chunks."""
    return drawing.place(name, _spread(drawing, name, *BIASES).mul(64).round().div(64).to(drawing.float_dtype(name)))


def decay_input(drawing: Drawing, name: str) -> Value:
    """Normal numbers, and some of 32 and -32: a token that clears the state, and one that keeps all of it."""
    return _with_extremes(drawing, name, 1.0, 32.0)


def beta_input(drawing: Drawing, name: str) -> Value:
    """Normal numbers of width 2, and some of 100 and -100: beta is 1, and 0."""
    return _with_extremes(drawing, name, 2.0, 100.0)


def cu_seqlens(drawing: Drawing, name: str) -> Value:
    """Half of the sequences as long as LENGTHS say, as far as there are tokens; the others share what is left."""
    total, count, generator = drawing.axis(name, "total_seq_len"), drawing.shape(name)[0] - 1, drawing.generator(name)
    lengths, left = [], total
    for sequence in range(count // 2):
        lengths.append(min(LENGTHS[sequence % len(LENGTHS)], left))
        left -= lengths[-1]
    cuts = torch.randint(left + 1, (max(0, count - len(lengths) - 1),), generator=generator).sort().values
    shares = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([left])]).diff()
    parts = torch.cat([torch.tensor(lengths, dtype=torch.int64), shares[: count - len(lengths)]])
    parts = parts[torch.randperm(count, generator=generator)]
    return drawing.place(name, torch.cat([torch.zeros(1, dtype=torch.int64), parts.cumsum(0)]).to(drawing.dtype(name)))


def state_slots(drawing: Drawing, name: str) -> Value:
    """Distinct slots in an order of their own; where the batch fills the pool, a quarter of it is padding instead."""
    count, pool, generator = drawing.shape(name)[0], drawing.axis(name, "pool_size"), drawing.generator(name)
    if count > pool:
        raise drawing.error(name, f"names {count} slots, but the pool has {pool}")
    slots = torch.randperm(pool, generator=generator)[:count]
    if count == pool:
        slots[torch.randperm(count, generator=generator)[: (count + 1) // 4]] = -1
    return drawing.place(name, slots.to(drawing.dtype(name)))


def unwritten(drawing: Drawing, name: str) -> Value:
    """NaN, so that what the kernel leaves out shows; made on the device, where it can be gigabytes."""
    shape = drawing.shape(name)
    drawing.hash_head(name, shape)
    return torch.full(shape, torch.nan, dtype=drawing.float_dtype(name), device=drawing.device)


def _spread(drawing: Drawing, name: str, low: float, high: float) -> torch.Tensor:
    """Evenly spaced numbers in float64, one a head, shuffled."""
    (heads,) = drawing.shape(name)
    steps = torch.randperm(heads, generator=drawing.generator(name)).double()
    return low + (high - low) * steps / max(1, heads - 1)


def _with_extremes(drawing: Drawing, name: str, width: float, extreme: float) -> Value:
    shape, dtype, generator = drawing.shape(name), drawing.float_dtype(name), drawing.generator(name)
    lot = torch.randint(EXTREME, (math.prod(shape),), generator=generator)
    parts = normal.normal_numbers(len(lot), dtype, generator, width)
    numbers = torch.cat([torch.empty(0, dtype=dtype), *parts])
    numbers[lot == 0], numbers[lot == 1] = extreme, -extreme
    return drawing.place(name, numbers.view(shape))

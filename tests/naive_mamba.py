"""Selective state updates one token and one head at a time, straight from the definition's words; and inputs to try."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def softplus(x: float) -> float:
    return x if x > 40 else math.log1p(math.exp(x))


def head(
    state: Tensor, x: Tensor, dt: list[float], rate: Tensor, b: Tensor, c: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """One head of one token: state, rate [head_dim, dstate]; x, skip [head_dim]; dt, one step a channel; b, c [dstate]

    -> output [head_dim], the next state.
    """
    outputs, states = [], []
    for channel, step in enumerate(dt):
        moved = torch.exp(step * rate[channel]) * state[channel] + step * x[channel] * b
        outputs.append((moved * c).sum() + skip[channel] * x[channel])
        states.append(moved)
    return torch.stack(outputs), torch.stack(states)


def mamba_ssu_decode(dtype: torch.dtype = torch.float64, **inputs: Any) -> dict[str, Tensor]:
    new_state, x, rate, b, c, skip = (inputs[name].to(dtype) for name in ("state", "x", "A", "B", "C", "D"))
    output, new_state = torch.zeros_like(x), new_state.clone()
    heads_a_group = x.shape[1] // b.shape[1]
    for row, slot in enumerate(inputs["state_batch_indices"].tolist()):
        if slot < 0:
            continue
        for h in range(x.shape[1]):
            before = zip(inputs["dt"][row, h].tolist(), inputs["dt_bias"][h].tolist(), strict=True)
            steps, group = [softplus(dt + bias) for dt, bias in before], h // heads_a_group
            output[row, h], new_state[slot, h] = head(
                new_state[slot, h], x[row, h], steps, rate[h], b[row, group], c[row, group], skip[h]
            )
    return {"output": output, "new_state": new_state}


def drawn(
    slots: list[int],
    cache: int,
    heads: tuple[int, int] = (4, 2),
    d: tuple[int, int] = (3, 8),
    dtype: torch.dtype = torch.bfloat16,
    channels: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs in the definition's order; heads and groups, head_dim and dstate; NaN in slots that nobody names.

    Rates of 0.01 to 4, one number a head for A, D, dt and dt_bias, or with `channels` as many as there are.
    """
    (nheads, ngroups), (head_dim, dstate), batch = heads, d, len(slots)
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    def alike(lead: int, *size: int) -> Tensor:
        own = size if channels else (*size[:lead], *[1] * (len(size) - lead))
        return normal(*own).expand(size).contiguous()

    state = torch.full((cache, nheads, head_dim, dstate), math.nan)
    used = [slot for slot in slots if slot >= 0]
    state[used] = normal(len(used), nheads, head_dim, dstate)
    return {
        "state": state.to(dtype),
        "x": normal(batch, nheads, head_dim).to(dtype),
        "dt": alike(2, batch, nheads, head_dim).to(dtype),
        "A": -alike(1, nheads, head_dim, dstate).exp().clamp(0.01, 4),
        "B": normal(batch, ngroups, dstate).to(dtype),
        "C": (normal(batch, ngroups, dstate) / math.sqrt(dstate)).to(dtype),
        "D": alike(1, nheads, head_dim).to(dtype),
        "dt_bias": (alike(1, nheads, head_dim) - 1).to(dtype),
        "state_batch_indices": torch.tensor(slots, dtype=torch.int32),
    }

"""Selective state updates by Mamba-2's own PyTorch function; run with transformers 5.23.0, not there in 5.12.1.

Where mamba-ssm is installed the model calls its kernel under the same name; here the function written in PyTorch is
meant, so it is unwrapped.
"""

from __future__ import annotations

import inspect

import torch
from transformers.models.mamba2 import modeling_mamba2

from refgrid_groundtruth.broadcast import demand_no_padding


def mamba_ssu_decode(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803 - the definition's names
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor,  # noqa: N803
    dt_bias: torch.Tensor,
    state_batch_indices: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """mamba2_selective_state_update on the states of the batch, which it updates in place: it knows no cache.

    state [state_cache_size, nheads, head_dim, dstate]; x, dt [batch_size, nheads, head_dim]; A [nheads, head_dim,
    dstate]; B, C [batch_size, ngroups, dstate]; D, dt_bias [nheads, head_dim]; state_batch_indices [batch_size]
    -> output as x, new_state as state. Raises Unavailable("unsupported") for padding.
    """
    demand_no_padding(state_batch_indices)
    slots = state_batch_indices.long()
    moved, new_state = state[slots], state.clone()
    function = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    output = function(moved, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=True)
    new_state[slots] = moved
    return {"output": output, "new_state": new_state}

"""Selective state updates by flashinfer.mamba, since 0.6.2; read in 0.6.7.post3, 0.6.12 and 0.7.2.post1.

The kernel takes A, D, dt and dt_bias as broadcast views of one number a head and refuses others, the inputs that
FlashInfer's own trace template makes among them.
"""

from __future__ import annotations

import flashinfer.mamba
import torch

from refgrid_groundtruth.broadcast import given, per_head


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
    """flashinfer.mamba.selective_state_update on a copy of the cache, which it updates in place.

    state [state_cache_size, nheads, head_dim, dstate]; x, dt [batch_size, nheads, head_dim]; A [nheads, head_dim,
    dstate]; B, C [batch_size, ngroups, dstate]; D, dt_bias [nheads, head_dim]; state_batch_indices [batch_size] int32
    -> new_state as state, and without padding output as x. Raises Unavailable("unsupported") for A, D, dt or dt_bias
    that differ within a head.
    """
    new_state = state.clone()
    output = flashinfer.mamba.selective_state_update(
        *(new_state, x, per_head("dt", dt, 2), per_head("A", A, 1), B, C, per_head("D", D, 1)),
        dt_bias=per_head("dt_bias", dt_bias, 1),
        dt_softplus=True,
        state_batch_indices=state_batch_indices,
        pad_slot_id=-1,
    )
    return given(output, new_state, state_batch_indices)

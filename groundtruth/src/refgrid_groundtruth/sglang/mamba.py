"""Selective state updates by SGLang's Triton kernel; read in 0.5.15."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.mamba.ops.mamba_ssm import selective_state_update

from refgrid_groundtruth.broadcast import given


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
    """selective_state_update of mamba_ssm.py itself: its dispatcher of that name may go to FlashInfer's kernel.

    state [state_cache_size, nheads, head_dim, dstate], of which it gets a copy; x, dt [batch_size, nheads, head_dim]; A
    [nheads, head_dim, dstate]; B, C [batch_size, ngroups, dstate]; D, dt_bias [nheads, head_dim]; state_batch_indices
    [batch_size] int32 -> new_state as state, and without padding output as x.
    """
    new_state, output = state.clone(), torch.empty_like(x)
    selective_state_update(
        *(new_state, x, dt, A, B, C, D),
        dt_bias=dt_bias,
        dt_softplus=True,
        state_batch_indices=state_batch_indices,
        pad_slot_id=-1,
        out=output,
    )
    return given(output, new_state, state_batch_indices)

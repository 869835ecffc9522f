"""Selective state updates by SGLang's Triton kernel; read in sglang 0.5.15."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.mamba.ops.mamba_ssm import selective_state_update

from refgrid_groundtruth.broadcast import demand_no_padding, per_head


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
    """selective_state_update on a copy of the cache, with one number a head, as its models call it.

    Shapes as in the definition. Raises Unavailable("unsupported") for padding, whose output it does not define.
    """
    demand_no_padding(state_batch_indices)
    new_state, output = state.clone(), torch.empty_like(x)
    selective_state_update(
        *(new_state, x, per_head("dt", dt, 2), per_head("A", A, 1), B, C, per_head("D", D, 1)),
        dt_bias=per_head("dt_bias", dt_bias, 1),
        dt_softplus=True,
        state_batch_indices=state_batch_indices,
        out=output,
    )
    return {"output": output, "new_state": new_state}

"""Selective state updates in float64, sequence by sequence, as sums over a head's numbers."""

from __future__ import annotations

import torch


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
    """y = decay (s C) + dt x (B C) + D x: the new state is not needed for the output. Shapes as in the definition."""
    output, new_state = torch.zeros_like(x), state.clone()
    group = torch.arange(x.shape[1], device=x.device) // (x.shape[1] // B.shape[1])
    for row, slot in enumerate(state_batch_indices.tolist()):
        if slot < 0:
            continue
        step = torch.logaddexp(
            dt[row].double() + dt_bias.double(), torch.zeros((), dtype=torch.float64, device=x.device)
        )
        decay = torch.exp(step[:, :, None] * A.double())
        b, c, given = B[row, group].double(), C[row, group].double(), x[row].double()
        old = decay * state[slot].double()
        y = torch.einsum("hds,hs->hd", old, c) + step * given * torch.einsum("hs,hs->h", b, c)[:, None]
        output[row] = (y + D.double() * given).to(x.dtype)
        new_state[slot] = (old + torch.einsum("hd,hs->hds", step * given, b)).to(state.dtype)
    return {"output": output, "new_state": new_state}

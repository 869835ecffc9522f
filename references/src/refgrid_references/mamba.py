"""The selective state space of Mamba-2 (Dao and Gu 2024, https://arxiv.org/abs/2405.21060), one token at a time.

Each channel of a head holds a state s [dstate]. A token decays it, adds its input along B, and is read out along C:

    dt' = softplus(dt + dt_bias),    s = exp(dt' A) s + dt' x B,    y = s . C + D x
"""

import torch

from refgrid_references.blocks import block_elements


def mamba_ssu_decode(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    state_batch_indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token a sequence, whose states lie in a cache, as flashinfer.mamba.selective_state_update.

    state [state_cache_size, nheads, head_dim, dstate]; x, dt [batch_size, nheads, head_dim]; A [nheads, head_dim,
    dstate] float32, negative; B, C [batch_size, ngroups, dstate], head h reads group h // (nheads / ngroups); D,
    dt_bias [nheads, head_dim]; state_batch_indices [batch_size], the slot of each sequence, negative for padding
    -> output as x, 0 for padding; new_state, the cache with the slots of the batch updated.
    """
    output, new_state = torch.zeros_like(x), state.clone()
    real = (state_batch_indices >= 0).nonzero()[:, 0]
    for row in real.split(max(1, block_elements(state.device) // A.numel())):
        slot = state_batch_indices[row].long()
        token = [each[row].float() for each in (x, dt, B, C)]
        y, s = update(state[slot].float(), token, A, D.float(), dt_bias.float())
        output[row], new_state[slot] = y.to(x.dtype), s.to(state.dtype)
    return output, new_state


def update(
    s: torch.Tensor, token: list[torch.Tensor], A: torch.Tensor, D: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of n sequences, straight from the equations: the output reads the state before it is rounded.

    s [n, nheads, head_dim, dstate]; token x, dt [n, nheads, head_dim] and B, C [n, ngroups, dstate]; A, D, dt_bias as
    above; all float32 -> y [n, nheads, head_dim], s as given.
    """
    x, dt, *groups = token
    b, c = (each.repeat_interleave(x.shape[1] // each.shape[1], dim=1) for each in groups)  # [n, nheads, dstate]
    dt = torch.nn.functional.softplus(dt + dt_bias)
    s = (dt[..., None] * A).exp_().mul_(s).addcmul_((dt * x)[..., None], b[:, :, None])
    return (s * c[:, :, None]).sum(dim=-1) + D * x, s

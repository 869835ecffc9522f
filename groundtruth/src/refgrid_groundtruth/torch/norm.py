"""Norms by torch.nn.functional.rms_norm (since 2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    import torch


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> dict[str, torch.Tensor]:
    """hidden_states [batch_size, hidden_size], weight [hidden_size] -> output as hidden_states.

    torch.nn.functional.rms_norm (since 2.4).
    """
    return {"output": functional.rms_norm(hidden_states, (hidden_states.shape[-1],), weight, eps)}


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> dict[str, torch.Tensor]:
    """hidden_states, residual [batch_size, hidden_size], weight [hidden_size] -> output, residual_out alike.

    The library's own add and torch.nn.functional.rms_norm, as a model's layer composes them: the norm sees the sum
    rounded to the dtype, a fused kernel the unrounded one. In bfloat16 they differ by one rounding of the sum.
    """
    residual_out = residual + hidden_states
    return {**rmsnorm(residual_out, weight, eps=eps), "residual_out": residual_out}

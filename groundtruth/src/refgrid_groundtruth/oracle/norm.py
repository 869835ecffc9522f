"""Norms in float64, as a row over its length."""

from __future__ import annotations

import torch


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> dict[str, torch.Tensor]:
    """hidden_states [batch_size, hidden_size], weight [hidden_size] -> output as hidden_states."""
    return {"output": _scaled(hidden_states.double(), weight, eps).to(hidden_states.dtype)}


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> dict[str, torch.Tensor]:
    """The norm of the unrounded sum: hidden_states, residual [batch_size, hidden_size] -> output, residual_out."""
    x = hidden_states.double() + residual.double()
    return {"output": _scaled(x, weight, eps).to(hidden_states.dtype), "residual_out": x.to(residual.dtype)}


def _scaled(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each row divided by sqrt(|x|^2 / n + eps)."""
    length = torch.einsum("bh,bh->b", x, x) / x.shape[1]
    return x / torch.sqrt(length + eps)[:, None] * weight.double()

"""Norms by flashinfer.norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import flashinfer.norm

if TYPE_CHECKING:
    import torch


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> dict[str, torch.Tensor]:
    """hidden_states [batch_size, hidden_size], weight [hidden_size] -> output as hidden_states.

    flashinfer.norm.rmsnorm, whose kernel is CUDA C++, since 0.6.7 CuTe DSL where nvidia-cutlass-dsl is installed.
    """
    return {"output": flashinfer.norm.rmsnorm(hidden_states, weight, eps)}


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> dict[str, torch.Tensor]:
    """hidden_states, residual [batch_size, hidden_size], weight [hidden_size] -> output, residual_out alike.

    flashinfer.norm.fused_add_rmsnorm writes the output over hidden_states and the sum over residual: it gets copies.
    """
    output, residual_out = hidden_states.clone(), residual.clone()
    flashinfer.norm.fused_add_rmsnorm(output, residual_out, weight, eps)
    return {"output": output, "residual_out": residual_out}

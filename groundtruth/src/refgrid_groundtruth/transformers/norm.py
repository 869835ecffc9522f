"""Norms by Olmo2RMSNorm; run with transformers 5.23.0."""

from __future__ import annotations

import torch
from transformers.models.olmo2 import modeling_olmo2


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> dict[str, torch.Tensor]:
    """hidden_states [batch_size, hidden_size], weight [hidden_size] -> output as hidden_states.

    Olmo2RMSNorm multiplies by the weight in float32 and rounds once, as the kernels do. LlamaRMSNorm rounds the
    normed value before the weight as well.
    """
    norm = modeling_olmo2.Olmo2RMSNorm(weight.shape[0], eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return {"output": norm(hidden_states)}


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> dict[str, torch.Tensor]:
    """hidden_states, residual [batch_size, hidden_size], weight [hidden_size] -> output, residual_out alike.

    As a decoder layer composes them: residual + hidden_states, then the norm of that sum, rounded to the dtype by then.
    """
    residual_out = residual + hidden_states
    return {**rmsnorm(residual_out, weight, eps=eps), "residual_out": residual_out}

"""RMSNorm (Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467), alone and fused with the residual sum."""

import torch


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Root mean square normalisation of each row, as flashinfer.norm.rmsnorm.

    hidden_states [batch_size, hidden_size], weight [hidden_size] -> output [batch_size, hidden_size] in
    hidden_states' dtype. eps is added to the mean of squares, inside the root.
    """
    x = hidden_states.float()
    y = normalise(x, weight, eps)
    return y.to(hidden_states.dtype)


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual sum and its RMSNorm, as flashinfer.norm.fused_add_rmsnorm (which updates both tensors in place).

    hidden_states, residual [batch_size, hidden_size], weight [hidden_size] -> output, residual_out, both
    [batch_size, hidden_size] in the dtype of hidden_states and of residual. The norm uses the unrounded float32 sum.
    """
    x = hidden_states.float() + residual.float()
    y = normalise(x, weight, eps)
    return y.to(hidden_states.dtype), x.to(residual.dtype)


def normalise(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight: x [batch_size, hidden_size] float32, weight [hidden_size] -> float32."""
    mean_square = x.square().mean(dim=-1, keepdim=True)  # [batch_size, 1]
    return x * torch.rsqrt(mean_square + eps) * weight.float()

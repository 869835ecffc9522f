"""Norms by the operators that sgl_kernel registers; read in sglang-kernel 0.4.4.

sgl_kernel.rmsnorm and fused_add_rmsnorm call flashinfer.norm where that is importable, and one kernel under two names
must not count as two truths: so the operators are called, which sgl_kernel built ahead. They were built from an older
FlashInfer's headers, though: a fault as old as that is in both.
"""

from __future__ import annotations

import sgl_kernel  # noqa: F401 - registers the operators
import torch

NO_PDL = False  # programmatic dependent launch concerns how kernels follow each other, not what they compute


def rmsnorm(hidden_states: torch.Tensor, weight: torch.Tensor, *, eps: float) -> dict[str, torch.Tensor]:
    """hidden_states [batch_size, hidden_size], weight [hidden_size] -> output as hidden_states."""
    output = torch.empty_like(hidden_states)
    torch.ops.sgl_kernel.rmsnorm(output, hidden_states, weight, eps, NO_PDL)
    return {"output": output}


def fused_add_rmsnorm(
    hidden_states: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, *, eps: float
) -> dict[str, torch.Tensor]:
    """hidden_states, residual [batch_size, hidden_size], weight [hidden_size] -> output, residual_out alike.

    The operator writes the output over hidden_states and the sum over residual: it gets copies.
    """
    output, residual_out = hidden_states.clone(), residual.clone()
    torch.ops.sgl_kernel.fused_add_rmsnorm(output, residual_out, weight, eps, NO_PDL)
    return {"output": output, "residual_out": residual_out}

"""Rotary embedding in float64, as a product of complex numbers."""

from __future__ import annotations

import torch


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A pair is a complex number, its rotation a factor. Shapes as in the definition."""
    half = cos_sin_cache.shape[1] // 2
    table = cos_sin_cache.double()[positions]
    turn = torch.complex(table[:, None, :half], table[:, None, half:])
    return {"q_out": _turned(q, turn), "k_out": _turned(k, turn)}


def _turned(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    half = turn.shape[-1]
    pair = torch.complex(x[:, :, :half].double(), x[:, :, half : 2 * half].double()) * turn
    return torch.cat([pair.real.to(x.dtype), pair.imag.to(x.dtype), x[:, :, 2 * half :]], dim=2)

"""Rotary embeddings one token, one head and one pair at a time, straight from the definition; and inputs to try."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def rotated(x: Tensor, row: Tensor, interleaved: bool) -> Tensor:
    """One head x [head_size], row [rotary_dim] of the table; neighbours are a pair if interleaved (GPT-J's style)."""
    half, y = len(row) // 2, x.clone()
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        cos, sin = row[i], row[half + i]
        y[first] = x[first] * cos - x[second] * sin
        y[second] = x[second] * cos + x[first] * sin
    return y


def rope_with_cos_sin_cache_neox_style(
    dtype: torch.dtype = torch.float64, interleaved: bool = False, **inputs: Any
) -> dict[str, Tensor]:
    table, outputs = inputs["cos_sin_cache"].to(dtype), {}
    for name in ("q", "k"):
        x = inputs[name].to(dtype)
        y = torch.zeros_like(x)
        for token, position in enumerate(inputs["positions"].tolist()):
            for head in range(x.shape[1]):
                y[token, head] = rotated(x[token, head], table[position], interleaved)
        outputs[f"{name}_out"] = y
    return outputs


def table(positions: int, rotary_dim: int, base: float = 100.0) -> Tensor:
    """Cosines of position / base^(2 i / rotary_dim), then the sines."""
    half = rotary_dim // 2
    angles = [[p / base ** (i / half) for i in range(half)] for p in range(positions)]
    rows = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    return torch.tensor(rows).view(positions, rotary_dim)


def drawn(
    positions: list[int],
    most: int,
    heads: tuple[int, int] = (3, 2),
    sizes: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Inputs in the definition's order; heads of q and of k, head_size and rotary_dim; NaN in rows not read."""
    random = torch.Generator().manual_seed(seed)
    cos_sin_cache = table(most, sizes[1])
    cos_sin_cache[[p for p in range(most) if p not in positions]] = math.nan
    return {
        "q": torch.randn(len(positions), heads[0], sizes[0], generator=random).to(dtype),
        "k": torch.randn(len(positions), heads[1], sizes[0], generator=random).to(dtype),
        "cos_sin_cache": cos_sin_cache,
        "positions": torch.tensor(positions, dtype=torch.int64),
    }

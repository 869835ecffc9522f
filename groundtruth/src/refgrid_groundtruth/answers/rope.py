"""Rotations by a quarter and by a half turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

HEAD_SIZE, ROTARY = 128, 64


def _rope_with_cos_sin_cache_neox_style() -> Answer:
    """Position 0 turns nothing, 1 by a quarter, 2 by a half. Number i of a head is i + 1 in q and -i in k.

    A quarter turn makes (a, b) to (-b, a), a half turn to (-a, -b), where a is number i and b number i + 32.
    """
    table = torch.zeros(3, ROTARY)
    table[0, :32], table[1, 32:], table[2, :32] = 1.0, 1.0, -1.0
    row = torch.arange(HEAD_SIZE, dtype=torch.float32)
    q, k = (row + 1).expand(3, 4, -1).bfloat16(), (-row).expand(3, 2, -1).bfloat16()
    positions = torch.tensor([1, 2, 0])
    given = {"q": q.contiguous(), "k": k.contiguous(), "cos_sin_cache": table, "positions": positions}
    return given, {"q_out": _turned(q), "k_out": _turned(k)}


def _turned(x: torch.Tensor) -> torch.Tensor:
    a, b, rest = x.split([32, 32, 64], dim=2)
    quarter, half = torch.cat([-b, a, rest], dim=2)[:1], torch.cat([-a, -b, rest], dim=2)[:1]
    return torch.cat([quarter, half, x[:1]])


CASES: dict[str, Callable[[], Answer]] = {"rope_with_cos_sin_cache_neox_style": _rope_with_cos_sin_cache_neox_style}

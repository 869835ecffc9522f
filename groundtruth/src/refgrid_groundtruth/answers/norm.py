"""Norms of constant rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

# Rows of equal values v have the mean square v^2; with eps 7 the root of 9 + 7 is 4 and every answer a quarter of v.
EPS = 7.0
WEIGHT = torch.tensor([1.0, 2.0, -0.5, 4.0], dtype=torch.bfloat16).repeat(32)


def _rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)[:, None].repeat(1, len(WEIGHT))


def _rmsnorm() -> Answer:
    given = {"hidden_states": _rows(3, -3, 0), "weight": WEIGHT.clone(), "eps": EPS}
    return given, {"output": _rows(0.75, -0.75, 0) * WEIGHT}


def _fused_add_rmsnorm() -> Answer:
    given = {
        "hidden_states": _rows(1, -5, 2),
        "residual": _rows(2, 2, -2),
        "weight": WEIGHT.clone(),
        "eps": EPS,
    }
    return given, {"output": _rows(0.75, -0.75, 0) * WEIGHT, "residual_out": _rows(3, -3, 0)}


CASES: dict[str, Callable[[], Answer]] = {
    "rmsnorm": _rmsnorm,
    "fused_add_rmsnorm": _fused_add_rmsnorm,
}

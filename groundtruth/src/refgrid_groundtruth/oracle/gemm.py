"""Matrix product in float64, a few columns of the result at a time: a weight is written out in parts."""

from __future__ import annotations

import torch

ELEMENTS = 2**24  # of B at once: 128 MiB


def gemm(A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: N803 - the definition's names
    """A [M, K], B [N, K] -> C [M, N] in A's dtype."""
    a, rows = A.double(), max(1, ELEMENTS // max(1, B.shape[1]))
    parts = [torch.einsum("mk,nk->mn", a, b.double()).to(A.dtype) for b in B.split(rows)]
    return {"C": torch.cat(parts, dim=1)}

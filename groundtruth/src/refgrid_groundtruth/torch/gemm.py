"""Matrix products by torch.nn.functional.linear."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator


def gemm(A: torch.Tensor, B: torch.Tensor) -> dict[str, torch.Tensor]:  # noqa: N803 - the definition's names
    """A [M, K], B [N, K] -> C [M, N] = A B^T in A's dtype, by torch.nn.functional.linear."""
    with _float32_partial_sums():
        return {"C": functional.linear(A, B)}


@contextlib.contextmanager
def _float32_partial_sums() -> Iterator[None]:
    """On CUDA, float16 partial sums of a split K may be added in float16 by default; a truth must not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_fp16_reduced_precision_reduction
    matmul.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before

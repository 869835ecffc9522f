"""Matrix product with a transposed right-hand side, as torch.nn.functional.linear without bias."""

import torch

# Rows of B are upcast in blocks of this many elements (256 MiB in float32): a whole vocabulary need not fit twice.
BLOCK_ELEMENTS = 2**26


def gemm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """C = A @ B^T, accumulated in float32.

    A [M, K], B [N, K] -> C [M, N] in A's dtype.
    """
    a = A.float()
    rows = max(1, BLOCK_ELEMENTS // max(B.shape[1], A.shape[0], 1))
    blocks = [(a @ b.float().T).to(A.dtype) for b in torch.split(B, rows)]  # each [M, rows]
    return torch.cat(blocks, dim=1)

"""Normal numbers that are the same on every machine.

They come from integer draws of the CPU generator and a table of rounded quantiles: neither vector instructions nor a
maths library change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from statistics import NormalDist

import torch

BLOCK = 2**22  # numbers drawn at once, a multiple of 4: 16 MiB of indices, however large the tensor


def normal_numbers(
    count: int, dtype: torch.dtype, generator: torch.Generator, scale: float = 1.0, block: int | None = None
) -> Iterator[torch.Tensor]:
    """`count` normal numbers of standard deviation `scale`, in blocks; the same whatever the block, a multiple of 4.

    dtype is a floating-point dtype; each tensor is [at most block], on the CPU.
    """
    block = block or BLOCK
    wide = dtype in (torch.float32, torch.float64)
    table = quantiles() * scale if wide else (quantiles() * scale).to(dtype)
    for start in range(0, count, block):
        size = min(block, count - start)
        if wide:  # two draws a number: 65,536 distinct values would be full of ties
            sums = table.index_select(0, draws(2 * size, generator)).view(size, 2).sum(1)
            yield (sums * math.sqrt(0.5)).to(dtype)
        else:
            yield table.index_select(0, draws(size, generator))


def draws(count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` integers in [0, 65536), four from each 64-bit draw."""
    words = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def movable(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of an 8-bit float, for which not every operation that only moves numbers is there."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@cache
def quantiles() -> torch.Tensor:
    """65,536 normal quantiles in float64, rounded so that no maths library differs in them."""
    normal = NormalDist()
    return torch.tensor([round(normal.inv_cdf((i + 0.5) / 65536), 6) for i in range(65536)], dtype=torch.float64)

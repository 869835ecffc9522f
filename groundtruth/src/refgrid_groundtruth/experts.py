"""What the tensors of a mixture of experts say, for the adapters whose library wants another layout or dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refgrid_groundtruth import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 128  # numbers that share a scale of the fp8 block format: along the input, and in weights along the output too


def gate_first(gemm1: torch.Tensor) -> torch.Tensor:
    """GEMM1's weights or their scales [..., rows, columns] from [up | gate], the definitions' order, to [gate | up]."""
    up, gate = gemm1.chunk(2, dim=-2)
    return torch.cat((gate, up), dim=-2)


def up_first(gemm1: torch.Tensor) -> torch.Tensor:
    """GEMM1's weights for a library that has the definitions' order."""
    return gemm1


def dequantised(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of fp8 weights [..., rows, columns] with scale [..., rows / BLOCK, columns / BLOCK]."""
    blocks = weights.float().unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    return blocks.mul_(scale[..., :, None, :, None]).flatten(-2).flatten(-3, -2)


def dequantised_input(hidden_states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The float32 numbers of fp8 hidden_states [seq_len, hidden_size] with scale [hidden_size / BLOCK, seq_len]."""
    return hidden_states.float().unflatten(1, (-1, BLOCK)).mul_(scale.transpose(0, 1)[:, :, None]).flatten(1)


def in_bfloat16(weights: torch.Tensor, order: Callable[[torch.Tensor], torch.Tensor] = up_first) -> torch.Tensor:
    """float32 weights [num_experts, rows, columns] as the same numbers in bfloat16, which holds e2m1 times 2**n.

    An expert at a time, for all of them can be a gigabyte or more. Raises Unavailable("unsupported") for a number that
    bfloat16 does not hold.
    """
    narrow = torch.empty_like(weights, dtype=torch.bfloat16)
    for number, (wide, place) in enumerate(zip(weights, narrow, strict=True)):
        place.copy_(order(wide))
        if not torch.equal(place.float(), order(wide)):
            raise Unavailable("unsupported", f"expert {number} has a weight that bfloat16 does not hold")
    return narrow


def on_this_rank(expert: torch.Tensor, offset: int, count: int, elsewhere: int) -> torch.Tensor:
    """Expert numbers of the whole model as those of a rank that holds `count` of them from `offset` on.

    An expert that another rank holds becomes `elsewhere`, in the library's way of saying so.
    """
    here = (expert >= offset) & (expert < offset + count)
    return torch.where(here, expert - offset, elsewhere)


def unpacked(topk_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Expert numbers (int32) and weights (float32) of int32s that hold the number above the 16 bits of a bfloat16."""
    weight = (topk_ids << 16).view(torch.float32)  # a bfloat16 is the upper half of a float32
    return topk_ids >> 16 & 0xFFFF, weight

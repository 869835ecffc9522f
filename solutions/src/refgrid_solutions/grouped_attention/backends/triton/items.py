"""What all kernels share: how a program finds its head and tile, how tensors are described to the copy engine."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = 1.4426950408889634
# The copy engine counts in units of this many bytes.
_UNIT = 16


@triton.jit
def head_and_tile(item: tl.tensor, num_tiles: tl.tensor, heads: tl.tensor, section: tl.tensor) -> tl.tuple:
    """Of an item, as a program is numbered: tile by tile over the heads of one section, then the next section."""
    before = item // (num_tiles * section)
    wide = tl.minimum(section, heads - before * section)
    rest = item - before * (num_tiles * section)
    return before * section + rest % wide, rest // wide


def described(tensor: torch.Tensor, rows: int) -> TensorDescriptor:
    """A tensor [n, heads, head_dim] for loads of so many rows of one head: [heads, n, head_dim]."""
    count, heads, width = tensor.shape
    row, head, _ = tensor.stride()
    return TensorDescriptor(tensor, [heads, count, width], [head, row, 1], [1, rows, width])


def loadable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a dense copy of one that the copy engine cannot read: odd addresses, odd steps or none at all."""
    size = tensor.element_size()
    steps = [step * size for step in tensor.stride()[:-1]]
    readable = tensor.stride(-1) == 1 and all(step > 0 and step % _UNIT == 0 for step in steps)
    if readable and tensor.data_ptr() % _UNIT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)

"""What is predicted to be faster: a model of tiles dealt out to processors, for choices that a plan must make.

A launch lasts as long as its work on all processors, or as its longest tile on one, whichever is more, and as a launch
itself. The numbers of a machine are rough on purpose: they must rank two ways, not time them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, Slice

# The ways of a backward pass whose kernel needs keys of each slice's own.
COPIES, CALLS = 0, 1

_TILE = 128
_MOST_SPLITS = 32
# What copies may take of the memory: the kernel writes gradients of the copied keys for every query head.
_LARGEST_COPIES = 8 * 2**30
_LARGEST_PARTS = 2**30


class Machine(NamedTuple):
    """A GPU under one kernel: processors, floating point operations and bytes a second, seconds a launch."""

    processors: int
    flops: float
    bandwidth: float
    launch: float


# PyTorch's FlashAttention-2 on an H200, backward: four kernels a call.
H200 = Machine(132, 330e12, 4.0e12, 40e-6)


def faster_way(plan: GroupedAttnPlan, machine: Machine = H200) -> int:
    """COPIES of the keys, one launch for all slices of a mask; or CALLS, one a slice, on the keys where they are."""
    if _copies_bytes(plan) > _LARGEST_COPIES:
        return CALLS
    groups = [[piece for piece in _seeing(plan) if piece.mask_type == mask_type] for mask_type in (FULL, CAUSAL)]
    copied = sum(seconds(group, plan, machine) for group in groups if group) + _copying_seconds(plan, machine)
    called = sum(seconds([piece], plan, machine) for piece in _seeing(plan))
    return COPIES if copied < called else CALLS


def seconds(group: Sequence[Slice], plan: GroupedAttnPlan, machine: Machine) -> float:
    """A backward launch for these slices: tiles of keys, each with all rows that see it; five products a pair."""
    operations = 10 * plan.head_dim
    work = operations * plan.num_heads_q * sum(piece.visible_pairs for piece in group) / machine.flops
    pairs = max(piece.num_rows * min(_TILE, piece.num_keys) for piece in group)
    return machine.launch + max(work, operations * pairs * machine.processors / machine.flops)


def splits(plan: GroupedAttnPlan, processors: int) -> int:
    """Into how many parts the keys of the longest forward tile should be split, so that it does not outlast the rest.

    At most plan.max_splits, and no more than 1 GiB of float32 parts.
    """
    heads = plan.num_heads_q // plan.num_heads_k
    tiles = [(-(-piece.num_rows * heads // _TILE) * plan.num_heads_k, piece.num_keys) for piece in _seeing(plan)]
    if not tiles:
        return 1
    share = sum(count * keys for count, keys in tiles) / processors
    wanted = -(-max(keys for _, keys in tiles) // max(int(share), _TILE))
    fitting = _LARGEST_PARTS // (4 * plan.total_q * plan.num_heads_q * plan.head_dim)
    return max(1, min(wanted, _MOST_SPLITS, fitting, plan.max_splits or _MOST_SPLITS))


def _seeing(plan: GroupedAttnPlan) -> list[Slice]:
    return [piece for piece in plan.slices if piece.visible_pairs]


def _copied_keys(plan: GroupedAttnPlan) -> int:
    return sum(piece.num_keys for piece in _seeing(plan))


def _copying_seconds(plan: GroupedAttnPlan, machine: Machine) -> float:
    """Of k and v, each read and written."""
    size = int(plan.dtype.itemsize)
    return 4 * _copied_keys(plan) * plan.num_heads_k * plan.head_dim * size / machine.bandwidth


def _copies_bytes(plan: GroupedAttnPlan) -> int:
    """Of k, v and their gradients."""
    size = int(plan.dtype.itemsize)
    return 2 * _copied_keys(plan) * (plan.num_heads_k + plan.num_heads_q) * plan.head_dim * size

"""What is predicted to be faster: a model of tiles dealt out to processors, for choices that a plan must make.

A launch lasts as long as its work on all processors, or as its longest tile on one, whichever is more, and as a launch
itself. The numbers of a machine are rough on purpose: they must rank two ways, not time them.

What the 92 shapes timed on an H200 by 2026-11-22 say of that (results/grouped, as graphs; backward is both passes less
the forward one):

- Launches in order, which are CALLS and what autograd adds for cutting the keys, took 2 to 88 % longer than COPIES in
  all 61 shapes for which COPIES are predicted. Where CALLS are predicted, launches in order took -1 to 9 % longer than
  those, 31 % with few rows a group. So COPIES were right in the 12 shapes beyond that; of the others this says little.
- 330 TFLOP/s: dense backward passes of 64K tokens ran at 320 to 330. Predicted times are 0.5 to 0.94 of the measured
  ones by COPIES, 0.84 to 0.99 by CALLS; a 45th of them for groups of a few rows over 64K keys, where the gradients of
  keys for every query head take the time, which both ways write and the model leaves out.
- Splits (splits.json there): 1, 2 and 4 parts in twelve shapes of 4K and 8K tokens or small groups. Rank 0 of eight at
  4K is faster in parts (2: 1.12 times as fast as 1), and one key head of rank 7 at 4K in 9: 1.65 times. In the other
  ten, for which one part is predicted, 2 and 4 take 11 to 14 % longer.
- Not measured: COPIES where CALLS are predicted, CALLS alone where COPIES are, the bandwidth, a launch, and what fits
  into the memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import starmap
from typing import TYPE_CHECKING, NamedTuple

from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, visible_pairs

if TYPE_CHECKING:
    from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan

# The ways of a backward pass whose kernel needs keys of each slice's own.
COPIES, CALLS = 0, 1

_TILE = 128
_MOST_SPLITS = 32
# A launch that splits keys over one that does not, where both fill an H200 (fa3-fwd 0.0.3): 1.11 to 1.14 in ten shapes.
_SPLITTING = 1.13
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
    rows, keys = _sizes(plan)
    if _copies_bytes(sum(keys), plan) > _LARGEST_COPIES:
        return CALLS
    longest = (num_rows * min(_TILE, num_keys) for num_rows, num_keys in zip(rows, keys, strict=True))
    calls = [*map(_Launch, starmap(visible_pairs, plan.seeing), longest)]
    masks = [piece[-1] for piece in plan.seeing]
    by_mask = ([call for call, of in zip(calls, masks, strict=True) if of == mask] for mask in (FULL, CAUSAL))
    copied = _seconds([_together(part) for part in by_mask if part], plan, machine)
    copied += _copying_seconds(sum(keys), plan, machine)
    return COPIES if copied < _seconds(calls, plan, machine) else CALLS


def few_tiles(plan: GroupedAttnPlan, machine: Machine = H200) -> bool:
    """Whether the tiles of keys, of all their heads, are fewer than processors, and those of rows than two each.

    A tile of keys has all rows that see it, of all query heads that share the head, and is one program of the kernels
    that sum on the chip: with few tiles most processors wait for the longest. Other kernels cut by query heads, too.
    """
    keys, rows = (-(-count // _TILE) for count in (plan.total_k, plan.total_q))
    return keys * plan.num_heads_k < machine.processors and rows * plan.num_heads_q < 2 * machine.processors


def splits(plan: GroupedAttnPlan, processors: int) -> int:
    """Into how many parts the keys of the longest forward tile should be split, so that it does not outlast the rest.

    1 where that would cost more than it brings; at most plan.max_splits, and no more than 1 GiB of float32 parts.
    """
    heads = plan.num_heads_q // plan.num_heads_k
    rows, keys = _sizes(plan)
    if not rows:
        return 1
    tiles = (-(-num_rows * heads // _TILE) * num_keys for num_rows, num_keys in zip(rows, keys, strict=True))
    share = max(int(sum(tiles) * plan.num_heads_k / processors), _TILE)
    longest = max(keys)
    fitting = _LARGEST_PARTS // (4 * plan.total_q * plan.num_heads_q * plan.head_dim)
    parts = max(1, min(-(-longest // share), _MOST_SPLITS, fitting, plan.max_splits or _MOST_SPLITS))
    return parts if _SPLITTING * max(share, longest / parts) < max(share, longest) else 1


def _sizes(plan: GroupedAttnPlan) -> tuple[list[int], list[int]]:
    """How many rows, and how many keys, each slice has of which some row sees some key."""
    return [piece[1] - piece[0] for piece in plan.seeing], [piece[3] - piece[2] for piece in plan.seeing]


class _Launch(NamedTuple):
    """Pairs of a head: all that are visible, and those of the longest tile of keys with all rows that see it."""

    pairs: int
    longest: int


def _together(launches: Sequence[_Launch]) -> _Launch:
    return _Launch(sum(one.pairs for one in launches), max(one.longest for one in launches))


def _seconds(launches: Sequence[_Launch], plan: GroupedAttnPlan, machine: Machine) -> float:
    """Of backward launches, one after the other; five products a pair."""
    pairs = sum(max(one.pairs * plan.num_heads_q, one.longest * machine.processors) for one in launches)
    return len(launches) * machine.launch + 10 * plan.head_dim * pairs / machine.flops


def _copying_seconds(keys: int, plan: GroupedAttnPlan, machine: Machine) -> float:
    """Of k and v, each read and written."""
    return 4 * keys * plan.num_heads_k * plan.head_dim * int(plan.dtype.itemsize) / machine.bandwidth


def _copies_bytes(keys: int, plan: GroupedAttnPlan) -> int:
    """Of k, v and their gradients."""
    return 2 * keys * (plan.num_heads_k + plan.num_heads_q) * plan.head_dim * int(plan.dtype.itemsize)

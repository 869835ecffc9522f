"""Slices as the sequences of a varlen kernel: one launch for all slices of a mask, over keys that they share.

Such a kernel takes sequences of rows that lie back to back, and reads the keys of each from an offset and a length of
its own. Offsets need not rise and ranges may overlap, so no key is copied. Rows between the slices become sequences
without keys.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import gt, sub
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan, device_ints, host_ints
from refgrid_solutions.grouped_attention.predicted import CALLS, COPIES
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, Numbers, Slice, rows_in_no_slice

# A gap is cut into sequences no longer than the longest slice, or this: the grid has room for the longest in each.
_GAP = 1024
_HOST_NUMBERS = 6


class Launch(NamedTuple):
    """What one launch is told: n sequences over the rows [first_row, last_row) of q, all under one mask.

    row_offsets [n + 1] int32, from first_row on; key_starts [n + 1] (the last is not read) and key_counts [n], int32,
    in the shared keys. blind: whether a row of them sees no key. backward: by COPIES the offsets [n + 1] int32, were
    each sequence's keys copied back to back; by CALLS those of each slice alone, 0 and its length, its rows and its
    keys [slices, 2] int32 each; nothing in a plan for the forward pass alone.
    """

    mask_type: int
    first_row: int
    last_row: int
    longest_rows: int
    longest_keys: int
    blind: int
    row_offsets: torch.Tensor
    key_starts: torch.Tensor
    key_counts: torch.Tensor
    backward: Sequence[torch.Tensor]

    @property
    def rows(self) -> slice:
        """The rows of q that the sequences cover."""
        return slice(self.first_row, self.last_row)

    @property
    def causal(self) -> bool:
        """Whether the mask is the bottom-right causal one."""
        return self.mask_type == CAUSAL


def packed(plan: GroupedAttnPlan, way: int | None, *numbers: int) -> tuple[torch.Tensor, ...]:
    """The launches of a plan, and numbers that a backend keeps beside them; the first tensor is on the CPU.

    way: by which to go backward, the last of the numbers; None where that is not needed.
    """
    numbers += () if way is None else (way,)
    host = [len(numbers), *numbers]
    parts: list[memoryview] = []
    for found in filter(None, (sequences(plan, mask_type) for mask_type in (FULL, CAUSAL))):
        of = _Columns.of(found)
        host += _host_numbers(found, of)
        parts += (memoryview(array("i", part)) for part in _device_parts(of, way))
    return host_ints(host), *device_ints(plan.device, *parts)


def unpacked(metadata: Sequence[torch.Tensor]) -> tuple[list[int], list[Launch]]:
    """The numbers and the launches that packed was told; reads the tensor on the CPU."""
    count, *host = metadata[0].tolist()
    numbers, host = host[:count], host[count:]
    masks = range(len(host) // _HOST_NUMBERS)
    parts = (len(metadata) - 1) // max(len(masks), 1)
    told = (host[mask * _HOST_NUMBERS :][:_HOST_NUMBERS] for mask in masks)
    there = (metadata[1 + mask * parts :][:parts] for mask in masks)
    return numbers, [Launch._make((*one, *own[:3], own[3:])) for one, own in zip(told, there, strict=True)]


def seeing(plan: GroupedAttnPlan, mask_type: int) -> list[Slice]:
    """The slices of a mask that have rows and keys, in the order of their rows."""
    return [*map(Slice._make, _of(plan, mask_type))]


def sequences(plan: GroupedAttnPlan, mask_type: int) -> list[Numbers]:
    """Those slices, and the gaps between them as slices without keys; empty if there are none."""
    own = _of(plan, mask_type)
    gaps = [*_gaps(own)] if own else []
    return sorted([*own, *gaps]) if gaps else own


def assembled(
    q: torch.Tensor, launches: Sequence[Launch], results: Sequence[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One out and one lse from those of the launches, each of its own rows; a row in none gives 0 and -inf.

    Where two launches cover a row, one of them had no keys for it: 0 and -inf, which change nothing.
    """
    out = joined(q, launches, [part for part, _ in results])
    if _is_all(q, launches):
        return out, results[0][1].contiguous()
    lse = q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    for launch, (_, part) in zip(launches, results, strict=True):
        lse[:, launch.rows] = torch.maximum(lse[:, launch.rows], part)
    return out, lse


def joined(q: torch.Tensor, launches: Sequence[Launch], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """A tensor as q from those of the launches, each of its own rows; a row in none gives 0."""
    if _is_all(q, launches):
        return parts[0].contiguous()
    whole = q.new_zeros(q.shape)
    for launch, part in zip(launches, parts, strict=True):
        whole[launch.rows] += part
    return whole


def minus_infinity(lse: torch.Tensor, launch: Launch) -> torch.Tensor:
    """The log-sum-exp of a row that sees no key as -inf, where a kernel writes +inf; in place."""
    return lse.masked_fill_(lse == math.inf, -math.inf) if launch.blind else lse


def _is_all(q: torch.Tensor, launches: Sequence[Launch]) -> bool:
    return len(launches) == 1 and launches[0].rows == slice(0, q.shape[0])


def _of(plan: GroupedAttnPlan, mask_type: int) -> list[Numbers]:
    return [piece for piece in plan.seeing if piece[-1] == mask_type]


def _gaps(own: Sequence[Numbers]) -> Iterator[Numbers]:
    q_starts, q_ends, *_, (mask_type, *_) = zip(*own, strict=True)
    if q_ends[:-1] == q_starts[1:]:
        return
    longest = max(_GAP, *map(sub, q_ends, q_starts))
    for start, end in rows_in_no_slice(own, q_ends[-1]):
        for piece in range(max(start, q_starts[0]), end, longest):
            yield piece, min(piece + longest, end), 0, 0, mask_type


class _Columns(NamedTuple):
    """Of each sequence, how many rows and keys it has, and where its keys begin."""

    rows: list[int]
    keys: list[int]
    key_starts: Sequence[int]

    @classmethod
    def of(cls, found: Sequence[Numbers]) -> _Columns:
        q_starts, q_ends, k_starts, k_ends, _ = zip(*found, strict=True)
        return cls([*map(sub, q_ends, q_starts)], [*map(sub, k_ends, k_starts)], k_starts)


def _host_numbers(found: Sequence[Numbers], of: _Columns) -> list[int]:
    """As the first fields of Launch."""
    (first_row, *_, mask_type), (_, last_row, *_) = found[0], found[-1]
    blind = 0 in of.keys or (mask_type == CAUSAL and any(map(gt, of.rows, of.keys)))
    return [mask_type, first_row, last_row, max(of.rows), max(of.keys), int(blind)]


def _device_parts(of: _Columns, way: int | None) -> list[list[int]]:
    """As the last fields of Launch, those of the way back last."""
    parts = [[0, *accumulate(of.rows)], [*of.key_starts, 0], of.keys]
    if way == COPIES:
        return [*parts, [0, *accumulate(of.keys)]]
    if way == CALLS:
        own = [(rows, keys) for rows, keys in zip(of.rows, of.keys, strict=True) if keys]
        parts += ([end for count in counts for end in (0, count)] for counts in zip(*own, strict=True))
    return parts

"""Inputs of grouped attention: slices of queries with ranges of shared keys, and keys that no query sees.

What a workload's slices are like, its uuid says by one word; without one they are mixed.

    zigzag    rank r of w ranks ("zigzag_w8_r3", or "_first", "_last"): two causal slices a sequence, which are its
              chunks r and 2 w - 1 - r of 2 w
    shared    all slices see the same keys, none hidden
    singles   a query each
    lopsided  the last slice has 99 % of the queries
    blind     causal slices of more queries than keys, and such without keys
    mixed     any, one of them without queries; an eighth of the queries is in no slice

Slices are in no order. About a sixteenth of the keys at either end is in no range, but for zigzag.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from refgrid.proving.inputs.paged import composition

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

FULL, CAUSAL = 0, 1
UNSEEN = 1e4  # about what a key that no query sees is made of: large, and yet finite in float16


class _Wish(NamedTuple):
    """How many slices, queries and keys there are, and the workload's uuid."""

    slices: int
    total_q: int
    total_k: int
    uuid: str
    generator: torch.Generator

    def below(self, bounds: torch.Tensor) -> torch.Tensor:
        """A whole number of [0, bound) for each bound; 0 for a bound of 0."""
        drawn = torch.randint(2**40, bounds.shape, generator=self.generator)
        return drawn % bounds.clamp(min=1)


def q_ranges(drawing: Drawing, name: str) -> Value:
    """Of each slice the queries [start, end): disjoint."""
    return drawing.place(name, _slices(drawing, name, slice(0, 2)))


def k_ranges(drawing: Drawing, name: str) -> Value:
    """Of each slice the keys [start, end): free to overlap."""
    return drawing.place(name, _slices(drawing, name, slice(2, 4)))


def mask_types(drawing: Drawing, name: str) -> Value:
    """Of each slice 0 for full or 1 for causal."""
    return drawing.place(name, _slices(drawing, name, 4))


def keys(drawing: Drawing, name: str) -> Value:
    """Normal numbers, and UNSEEN with either sign where no query sees the key: whoever reads it is far off."""
    shape = drawing.shape(name)
    drawn = torch.cat([torch.empty(0), *drawing.numbers(name, shape[0] * shape[1] * shape[2])]).view(shape)
    seen = seen_keys(drawing.known("q_ranges", name), drawing.known("k_ranges", name), shape[0])
    hostile = torch.full_like(drawn, UNSEEN).copysign(drawn)
    return drawing.place(name, torch.where(seen[:, None, None], drawn, hostile).to(drawing.float_dtype(name)))


def seen_keys(q_ranges: torch.Tensor, k_ranges: torch.Tensor, total_k: int) -> torch.Tensor:
    """Which keys some query sees, [total_k] bool: those of a slice with queries, as the last of these sees them all."""
    steps = torch.zeros(total_k + 1, dtype=torch.int64)
    starts, ends = k_ranges[q_ranges[:, 0] < q_ranges[:, 1]].long().unbind(1)
    steps.index_add_(0, starts, torch.ones_like(starts))
    steps.index_add_(0, ends, -torch.ones_like(ends))
    return steps.cumsum(0)[:total_k] > 0


def _slices(drawing: Drawing, name: str, part: slice | int) -> torch.Tensor:
    """Of all slices a part of: queries from and to, keys from and to, mask. Each input is a part of the same."""
    slices, total_q, total_k = (drawing.axis(name, axis) for axis in ("num_slices", "total_q", "total_k"))
    wish = _Wish(slices, total_q, total_k, drawing.workload.uuid, drawing.generator("q_ranges"))
    made = next((make for word, make in _KINDS.items() if word in wish.uuid.split("_")), _mixed)
    try:
        found = made(wish)
    except ValueError as error:
        raise drawing.error(name, str(error)) from error
    shuffled = found[torch.randperm(len(found), generator=wish.generator)]
    return shuffled[:, part].to(torch.int32, memory_format=torch.contiguous_format)


def _mixed(wish: _Wish) -> torch.Tensor:
    lengths = composition(wish.total_q - wish.total_q // 8, wish.slices, wish.generator)
    if wish.slices > 2:
        lengths[2], lengths[1] = lengths[1] + lengths[2], 0
    return _seeing(wish, _spread(wish, lengths))


def _singles(wish: _Wish) -> torch.Tensor:
    rows = torch.randperm(wish.total_q, generator=wish.generator)[: wish.slices]
    if len(rows) < wish.slices:
        raise ValueError(f"{wish.slices} slices of a query each need as many queries, but total_q is {wish.total_q}")
    return _seeing(wish, torch.stack([rows, rows + 1], dim=1))


def _lopsided(wish: _Wish) -> torch.Tensor:
    lengths = torch.full((wish.slices,), wish.total_q // 100)
    lengths[-1:] = wish.total_q - int(lengths[:-1].sum())
    return _seeing(wish, _spread(wish, lengths))


def _shared(wish: _Wish) -> torch.Tensor:
    lengths = torch.full((wish.slices,), wish.total_q // max(1, wish.slices))
    first, last = _window(wish)
    seen = torch.tensor([first, last, FULL]).expand(wish.slices, 3)
    return torch.cat([_spread(wish, lengths), seen], dim=1)


def _blind(wish: _Wish) -> torch.Tensor:
    """Every third slice has keys for a part of its queries only, every third has none."""
    rows = _spread(wish, composition(wish.total_q - wish.total_q // 8, wish.slices, wish.generator))
    found = _seeing(wish, rows)
    queries, keys = (found[:, 1] - found[:, 0]), (found[:, 3] - found[:, 2])
    kind = torch.arange(wish.slices) % 3
    few = torch.minimum(keys, wish.below(queries))
    found[:, 3] = found[:, 2] + torch.where(kind == 0, few, torch.where(kind == 1, 0, keys))
    found[kind == 0, 4] = CAUSAL
    return found


def _zigzag(wish: _Wish) -> torch.Tensor:
    """Of each sequence the rank's two chunks lie side by side in q, and all of it in k."""
    told = re.search(r"zigzag_w(\d+)_(?:r(\d+)|(first|last))", wish.uuid)
    if told is None:
        raise ValueError("a zigzag names its world size and its rank, as in zigzag_w8_r7")
    world = int(told[1])
    rank = int(told[2]) if told[2] else 0 if told[3] == "first" else world - 1
    sequences, chunks = wish.slices // 2, wish.total_k // (2 * world)
    if wish.slices % 2 or rank >= world or chunks * 2 != wish.total_q or chunks * 2 * world != wish.total_k:
        wanted = f"two slices a sequence, and {world} times as many keys as queries, {2 * world} chunks of each"
        raise ValueError(f"rank {rank} of {world} ranks needs {wanted}")
    chunk = 1 + composition(chunks - sequences, sequences, wish.generator)
    before = chunk.cumsum(0) - chunk  # chunks of one of the sequences before
    parts = []
    for half, place in enumerate((rank, 2 * world - 1 - rank)):
        row, key = 2 * before + half * chunk, 2 * world * before
        mask = torch.full_like(chunk, CAUSAL)
        parts.append(torch.stack([row, row + chunk, key, key + (place + 1) * chunk, mask], dim=1))
    return torch.cat(parts)


_KINDS: Mapping[str, Callable[[_Wish], torch.Tensor]] = {
    "zigzag": _zigzag,
    "shared": _shared,
    "singles": _singles,
    "lopsided": _lopsided,
    "blind": _blind,
}


def _spread(wish: _Wish, lengths: torch.Tensor) -> torch.Tensor:
    """Ranges of these lengths from left to right, with what is left over as gaps: [slices, 2]."""
    gaps = composition(wish.total_q - int(lengths.sum()), len(lengths) + 1, wish.generator)[: len(lengths)]
    start = (lengths + gaps).cumsum(0) - lengths
    return torch.stack([start, start + lengths], dim=1)


def _seeing(wish: _Wish, rows: torch.Tensor) -> torch.Tensor:
    """Ranges of keys and masks for ranges of queries: where there is room, at least as many keys as queries.

    Any start, any end behind it, whoever else has these keys. What is short of keys is not causal.
    """
    first, last = _window(wish)
    least = (rows[:, 1] - rows[:, 0]).clamp(1, max(1, last - first)).clamp(max=last - first)
    start = first + wish.below(last - first - least + 1)
    end = start + least + wish.below(last - start - least + 1)
    mask = torch.randint(2, (len(rows),), generator=wish.generator)
    if len(rows) > 1:
        mask[1] = 1 - mask[0]
    mask[end - start < rows[:, 1] - rows[:, 0]] = FULL
    return torch.cat([rows, torch.stack([start, end, mask], dim=1)], dim=1)


def _window(wish: _Wish) -> tuple[int, int]:
    """The keys that ranges are of; they start at an odd one, which no tile or vector of a kernel does."""
    margin = wish.total_k // 16
    margin += bool(margin) - margin % 2
    return margin, wish.total_k - margin

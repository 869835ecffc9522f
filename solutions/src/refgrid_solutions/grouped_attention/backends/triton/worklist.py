"""What there is to do, as rows of integers that the kernels read: made once a plan, on the host, without heads.

Every head has the same tiles, so a list is of one head; a kernel finds head and tile of an item by arithmetic (see
items.py), in sections of heads whose keys fit into the cache together, the longest tiles of a section first.

repeat_interleave, however little it repeats, and an index in brackets of 3,000 numbers start threads, which on a host
whose cores are busy may take longer than all the rest: _numbers and index_select do not.

A piece's rows see the more keys the further down they are: row i, counted from a piece's or a tile's first, sees the
first min(i + diagonal, num_keys) keys of its slice, none if that is negative. A full slice's diagonal is its num_keys.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.plan import tensor_of
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, Slice, rows_in_no_slice

# Columns of the lists.
ROW_TILE = ("row", "rows", "key", "whole", "masked", "diagonal", "num_keys", "place")
KEY_TILE = ("key", "first_run", "last_run")

# What each column of ROW_TILE is the more, a row further down.
_A_ROW_ON = torch.tensor([1, -1, 0, 0, 0, 1, 0, 1])
# Of an L2 cache of 50 MB: what the keys and values of one section may take.
_SECTION_BYTES = 32 * 2**20
# The copy engine reads float32 from multiples of this on.
_UNIT = 4


class Pieces(NamedTuple):
    """All rows of q: the slices and the gaps between them in the order of rows, a number of each a tensor."""

    row: torch.Tensor
    last_row: torch.Tensor
    key: torch.Tensor
    num_keys: torch.Tensor
    diagonal: torch.Tensor
    last_place: torch.Tensor
    num_rows: torch.Tensor

    @property
    def places(self) -> int:
        """How many places the statistics of all rows take."""
        return int(self.last_place[-1]) if len(self.last_place) else 0

    @property
    def table(self) -> torch.Tensor:
        """All but the last [n, 6]."""
        return torch.stack(self[:-1], 1)


def pieces(slices: Sequence[Slice], total_q: int) -> Pieces:
    """The slices as numbers; rows in none become pieces that see no key.

    last_place: where a piece's rows end among the statistics of rows. Each begins there at some distance from the one
    before, so that it ends at a multiple of four.
    """
    gaps = [Slice(start, end, 0, 0, FULL) for start, end in rows_in_no_slice(slices, total_q)]
    table = tensor_of(array("q", chain.from_iterable(sorted([*slices, *gaps])))).view(-1, 5)
    row, last_row, key, last_key, mask_type = table.unbind(1)
    num_rows, num_keys = last_row - row, last_key - key
    diagonal = num_keys - (num_rows - 1) * (mask_type == CAUSAL)
    last_place = (_quotient(num_rows, _UNIT) * _UNIT).cumsum(0)
    return Pieces(row, last_row, key, num_keys, diagonal, last_place, num_rows)


def row_tiles(of: Pieces, *sizes: tuple[int, int]) -> list[torch.Tensor]:
    """For each size, rows and keys of a tile: all rows of q in tiles, none of two pieces, the longest first [n, 8].

    Columns as ROW_TILE: the first row, how many rows, the slice's first key, blocks of so many keys that all rows see,
    then blocks that need a mask, the diagonal of the tile's first row, the slice's keys, the first row's place.
    """
    tiles, of_tiles, each = _cut(of, torch.tensor(sizes))
    tile_rows, tile_keys = of_tiles.unbind(1)
    _, rows, _, whole, masked, diagonal, num_keys, _ = tiles.unbind(1)
    rows.copy_(torch.minimum(rows, tile_rows))
    whole.copy_(torch.minimum(diagonal, num_keys).clamp_(min=0) // tile_keys)
    blocks = _quotient(torch.minimum(diagonal + rows - 1, num_keys).clamp_(min=0), tile_keys)
    masked.copy_(blocks - whole)
    orders = (torch.argsort(own, descending=True, stable=True) for own in blocks.split(each))
    return [own.index_select(0, order) for own, order in zip(tiles.split(each), orders, strict=True)]


def key_tiles(of: Pieces, total_k: int, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys in tiles of tile_keys from key 0 on [n, 3], those of the most rows first; and their runs [m].

    Columns as KEY_TILE: the first key, and which runs are the tile's. A run is the number of a piece whose rows see the
    tile, in the order of rows; which rows, and where they need a mask, the kernel works out. Tiles that the same pieces
    see share their runs.
    """
    keys = torch.arange(0, total_k, tile_keys)
    first = of.key // tile_keys
    last = torch.where(of.num_keys * of.num_rows > 0, _quotient(of.key + of.num_keys, tile_keys), first)
    shared, runs = _runs(first.tolist(), last.tolist(), len(keys))
    tiles = torch.cat([keys[:, None], shared[:, 1:].index_select(0, _numbers(shared[:, 0]))], 1)
    order = torch.argsort(_rows_seeing(of, keys, first, last, tile_keys), descending=True, stable=True)
    return tiles.index_select(0, order), runs


def heads_together(total_k: int, num_heads_k: int, head_dim: int, itemsize: int) -> int:
    """How many heads of k and v a section takes: as many as fit into the cache, one at least."""
    size = 2 * total_k * head_dim * itemsize
    return max(1, min(num_heads_k, _SECTION_BYTES // max(size, 1)))


def _cut(of: Pieces, sizes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tiles of the first size, then those of the next [n, 8], each with its size [n, 2], and how many of each size.

    Columns as ROW_TILE, but all rows from the tile's first on, and nothing of blocks: zeros would cost a tensor.
    """
    counts = _quotient(of.num_rows, sizes[:, :1])
    ends = counts.view(-1).cumsum(0)
    which = _numbers(ends)
    of_tiles = sizes.index_select(0, which // max(len(of.row), 1))
    starts = (ends - counts.view(-1)).index_select(0, which)
    above = (torch.arange(len(which)) - starts) * of_tiles[:, 0]
    first = (of.row, of.num_rows, of.key, of.key, of.key, of.diagonal, of.num_keys, of.last_place - of.num_rows)
    tiles = torch.stack(first, 1).repeat(len(sizes), 1).index_select(0, which)
    return tiles.add_(above[:, None] * _A_ROW_ON), of_tiles, counts.sum(1).tolist()


def _runs(firsts: Sequence[int], lasts: Sequence[int], num_tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Before which tile those end that the same pieces see, and which runs they share [n, 3]; the runs [m].

    Of each piece: the first tile that it sees, and the first that it sees no more.
    """
    begin, end = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list)
    for piece, (first, last) in enumerate(zip(firsts, lasts, strict=True)):
        if first < last:
            begin[first].append(piece)
            end[last].append(piece)
    shared, runs, seeing = array("q"), array("i"), array("i")
    for tile, following in pairwise([*sorted({0, *begin, *end}), num_tiles]):
        for piece in end[tile]:
            del seeing[bisect_left(seeing, piece)]
        for piece in begin[tile]:
            insort(seeing, piece)
        shared.extend((following, len(runs), len(runs) + len(seeing)))
        runs.extend(seeing)
    return tensor_of(shared).view(-1, 3), tensor_of(runs)


def _rows_seeing(
    of: Pieces, keys: torch.Tensor, first: torch.Tensor, last: torch.Tensor, tile_keys: int
) -> torch.Tensor:
    """How many rows see each tile: of a piece those that see the tile's first key, or the slice's first key.

    Summed up along the tiles, from where a piece adds its rows (first), where they become fewer (turn), and where it
    ends (last): that takes a few numbers a piece, and one a tile.
    """
    see_first = of.num_rows + of.diagonal - 1
    most, end = torch.minimum(of.num_rows, see_first), see_first + of.key
    turn = torch.minimum(torch.maximum((end - most) // tile_keys + 1, first), last)
    level, fewer = torch.zeros(2, len(keys) + 1, dtype=torch.int64)
    level.index_add_(0, first, most).index_add_(0, turn, end - most).index_add_(0, last, end, alpha=-1)
    fewer.index_add_(0, turn, torch.ones_like(turn)).index_add_(0, last, torch.ones_like(last), alpha=-1)
    return level.cumsum(0)[:-1] - keys * fewer.cumsum(0)[:-1]


def _numbers(ends: torch.Tensor) -> torch.Tensor:
    """0 up to the first end, 1 up to the second, and so on."""
    return torch.bincount(ends)[:-1].cumsum(0)


def _quotient(numbers: torch.Tensor, by: int | torch.Tensor) -> torch.Tensor:
    """Rounded up."""
    return (numbers + (by - 1)) // by

"""What there is to do, as rows of integers that the kernels read: made once a plan, on the host, without heads.

Every head has the same tiles, so a list is of one head; a kernel finds head and tile of an item by arithmetic (see
items.py), in sections of heads whose keys fit into the cache together, the longest tiles of a section first.

A slice's rows see the more keys the further down they are: row i, counted from a tile's first, sees the first
min(i + diagonal, num_keys) keys of its slice, none if that is negative. A full slice's diagonal is its num_keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.ranges import CAUSAL, Slice, rows_in_no_slice

# Columns of the lists. "place": of the first row among the rows' statistics, see _places.
ROW_TILE = ("row", "rows", "key", "whole", "masked", "diagonal", "num_keys", "place")
KEY_TILE = ("key", "first_run", "last_run")
RUN = ("row", "masked", "whole", "first_row", "first_key", "last_key", "diagonal", "place")
WIDTH = 8

# Of an L2 cache of 50 MB: what the keys and values of one section may take.
_SECTION_BYTES = 32 * 2**20
# The copy engine reads float32 from multiples of this on.
_UNIT = 4


class Pieces(NamedTuple):
    """All rows of q: the slices and the gaps between them in the order of rows, int64, a number of each a tensor."""

    row: torch.Tensor
    last_row: torch.Tensor
    key: torch.Tensor
    num_keys: torch.Tensor
    diagonal: torch.Tensor
    last_place: torch.Tensor

    def at(self, which: torch.Tensor) -> Pieces:
        """Some of them, in that order."""
        return Pieces(*torch.stack(self)[:, which])


def pieces(slices: Sequence[Slice], total_q: int) -> Pieces:
    """The slices as numbers; rows in none become pieces that see no key.

    last_place: where a piece's rows end among the statistics of rows. Each begins there at some distance from the one
    before, so that it ends at a multiple of four.
    """
    gaps = [Slice(start, end, 0, 0, 0) for start, end in rows_in_no_slice(slices, total_q)]
    numbers = torch.tensor([number for piece in sorted([*slices, *gaps]) for number in piece], dtype=torch.int64)
    row, last_row, key, last_key, mask_type = numbers.view(-1, 5).unbind(1)
    num_rows, num_keys = last_row - row, last_key - key
    diagonal = torch.where(mask_type == CAUSAL, num_keys - num_rows + 1, num_keys)
    return Pieces(row, last_row, key, num_keys, diagonal, (-(-num_rows // _UNIT) * _UNIT).cumsum(0))


def row_tiles(of: Pieces, tile_rows: int, tile_keys: int) -> torch.Tensor:
    """[n, WIDTH] int64: all rows of q in tiles of tile_rows or less, none of two pieces, the longest first.

    Columns as ROW_TILE: the first row, how many rows, the slice's first key, blocks of tile_keys keys that all rows
    see, then blocks that need a mask, the diagonal of the tile's first row, the slice's keys, the first row's place.
    """
    which, index = _expanded(-((of.row - of.last_row) // tile_rows))
    first, last_row, key, num_keys, diagonal, last_place = of.at(which)
    row, diagonal = first + index * tile_rows, diagonal + index * tile_rows
    rows = (last_row - row).clamp_(max=tile_rows)
    whole = torch.minimum(diagonal, num_keys).clamp_(min=0) // tile_keys
    blocks = -(-torch.minimum(diagonal + rows - 1, num_keys).clamp_(min=0) // tile_keys)
    order = torch.argsort(blocks, descending=True, stable=True)
    place = last_place - last_row + row
    return torch.stack([row, rows, key, whole, blocks - whole, diagonal, num_keys, place], 1)[order]


def key_tiles(of: Pieces, total_k: int, tile_rows: int, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys in tiles of tile_keys from key 0 on [n, WIDTH], the longest first; the runs [m, WIDTH] of rows for them.

    Columns as KEY_TILE: the first key, and which runs are the tile's. Of a run, as RUN: its first row, blocks of
    tile_rows rows that need a mask, then blocks in which every row sees every key of the tile, the slice's first row,
    the bounds of its keys, the diagonal in absolute numbers (a row of the slice sees keys < row + diagonal), and the
    place of the first row. Blocks end where the slice's rows end: the first one may begin above the slice's first row,
    or above row 0.
    """
    num_tiles = -(-total_k // tile_keys)
    first_tile = of.key // tile_keys
    seeing = (of.num_keys > 0) & (of.last_row > of.row)
    which, index = _expanded((-(-(of.key + of.num_keys) // tile_keys) - first_tile) * seeing)
    tile = first_tile[which] + index
    row, last_row, key, num_keys, diagonal, last_place = of.at(which)
    start, last_key, num_rows = tile * tile_keys, key + num_keys, last_row - row
    lowest, highest = torch.maximum(key, start), torch.minimum(last_key, start + tile_keys)
    first_seeing = (lowest - key + 1 - diagonal).clamp_(min=0)
    all_seeing = (highest - key - diagonal).clamp_(min=0)
    blocks = -((first_seeing - num_rows) // tile_rows)
    whole = (num_rows - all_seeing) // tile_rows * (highest - lowest == tile_keys)
    first, place = last_row - blocks * tile_rows, last_place - blocks * tile_rows
    runs = torch.stack([first, blocks - whole, whole, row, key, last_key, diagonal + key - row, place], 1)
    return _pointing(tile, blocks, num_tiles, tile_keys), runs[torch.argsort(tile, stable=True)]


def heads_together(total_k: int, num_heads_k: int, head_dim: int, itemsize: int) -> int:
    """How many heads of k and v a section takes: as many as fit into the cache, one at least."""
    size = 2 * total_k * head_dim * itemsize
    return max(1, min(num_heads_k, _SECTION_BYTES // max(size, 1)))


def copied(device: torch.device, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tables as int32 on the device, by one copy for all."""
    there = torch.cat(tables).to(torch.int32).to(device)
    return tuple(there.split([len(table) for table in tables]))


def _expanded(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each index as often as its count says, and how often it has come before."""
    which = torch.repeat_interleave(counts)
    return which, torch.arange(len(which)) - (counts.cumsum(0) - counts)[which]


def _pointing(tile: torch.Tensor, blocks: torch.Tensor, num_tiles: int, tile_keys: int) -> torch.Tensor:
    """The tiles of keys, each with where its runs begin and end once these are in the order of tiles."""
    counts = torch.bincount(tile, minlength=num_tiles)
    work = torch.zeros(num_tiles, dtype=torch.int64).index_add_(0, tile, blocks)
    ends = counts.cumsum(0)
    tiles = torch.zeros(num_tiles, WIDTH, dtype=torch.int64)
    tiles[:, 0], tiles[:, 1], tiles[:, 2] = torch.arange(num_tiles) * tile_keys, ends - counts, ends
    return tiles[torch.argsort(work, descending=True, stable=True)]

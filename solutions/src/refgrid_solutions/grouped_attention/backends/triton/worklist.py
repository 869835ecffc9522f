"""What there is to do, as rows of integers that the kernels read: made once a plan, on the host, without heads.

Every head has the same tiles, so a list is of one head; a kernel finds head and tile of an item by arithmetic (see
items.py), in sections of heads whose keys fit into the cache together, the longest tiles of a section first.

A piece's rows see the more keys the further down they are: row i, counted from a piece's or a tile's first, sees the
first min(i + diagonal, num_keys) keys of its slice, none if that is negative. A full slice's diagonal is its num_keys.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.ranges import CAUSAL, Slice, rows_in_no_slice

# Columns of the lists.
ROW_TILE = ("row", "rows", "key", "whole", "masked", "diagonal", "num_keys", "place")
KEY_TILE = ("key", "first_run", "last_run")

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

    @property
    def places(self) -> torch.Tensor:
        """How many places the statistics of all rows take: one number, 0 if there is no row."""
        return self.last_place[-1:].sum().view(1)

    @property
    def table(self) -> torch.Tensor:
        """[n, 6]."""
        return torch.stack(self, 1)


def pieces(slices: Sequence[Slice], total_q: int) -> Pieces:
    """The slices as numbers; rows in none become pieces that see no key.

    last_place: where a piece's rows end among the statistics of rows. Each begins there at some distance from the one
    before, so that it ends at a multiple of four.
    """
    gaps = [Slice(start, end, 0, 0, 0) for start, end in rows_in_no_slice(slices, total_q)]
    numbers = array("q", chain.from_iterable(sorted([*slices, *gaps])))
    table = torch.frombuffer(numbers, dtype=torch.int64) if numbers else torch.empty(0, dtype=torch.int64)
    row, last_row, key, last_key, mask_type = table.view(-1, 5).unbind(1)
    num_rows, num_keys = last_row - row, last_key - key
    diagonal = torch.where(mask_type == CAUSAL, num_keys - num_rows + 1, num_keys)
    return Pieces(row, last_row, key, num_keys, diagonal, (-(-num_rows // _UNIT) * _UNIT).cumsum(0))


def row_tiles(of: Pieces, tile_rows: int, tile_keys: int) -> torch.Tensor:
    """[n, 8] int64: all rows of q in tiles of tile_rows or less, none of two pieces, the longest first.

    Columns as ROW_TILE: the first row, how many rows, the slice's first key, blocks of tile_keys keys that all rows
    see, then blocks that need a mask, the diagonal of the tile's first row, the slice's keys, the first row's place.
    """
    counts = -((of.row - of.last_row) // tile_rows)
    which = torch.repeat_interleave(counts)
    first, last_row, key, num_keys, diagonal, last_place, before = _selected(which, *of, counts.cumsum(0) - counts)
    above = (torch.arange(len(which)) - before) * tile_rows
    row, diagonal = first + above, diagonal + above
    rows = (last_row - row).clamp_(max=tile_rows)
    whole = torch.minimum(diagonal, num_keys).clamp_(min=0) // tile_keys
    blocks = -(-torch.minimum(diagonal + rows - 1, num_keys).clamp_(min=0) // tile_keys)
    order = torch.argsort(blocks, descending=True, stable=True)
    place = last_place - last_row + row
    return torch.stack([row, rows, key, whole, blocks - whole, diagonal, num_keys, place], 1)[order]


def key_tiles(of: Pieces, total_k: int, tile_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All keys in tiles of tile_keys from key 0 on [n, 3], those of the most rows first; and their runs [m].

    Columns as KEY_TILE: the first key, and which runs are the tile's. A run is the number of a piece whose rows see the
    tile, in the order of rows; which rows, and where they need a mask, the kernel works out.
    """
    num_tiles, num_rows = -(-total_k // tile_keys), of.last_row - of.row
    first_tile = of.key // tile_keys
    counts = (-(-(of.key + of.num_keys) // tile_keys) - first_tile) * ((of.num_keys > 0) & (num_rows > 0))
    which = torch.repeat_interleave(counts)
    # How many rows see a tile: as many as see the key of the slice that the tile begins with, or the slice's first key.
    see_first = num_rows + of.diagonal - 1
    most, before = torch.minimum(num_rows, see_first), counts.cumsum(0) - counts
    shift, end, most = _selected(which, first_tile - before, see_first + of.key, most)
    tile = torch.arange(len(which)) + shift
    work = torch.zeros(num_tiles, dtype=torch.int64)
    work.index_add_(0, tile, torch.minimum(end - tile * tile_keys, most))
    ends = torch.bincount(tile, minlength=num_tiles).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]]) if num_tiles else ends
    tiles = torch.stack([torch.arange(num_tiles) * tile_keys, starts, ends], 1)
    return tiles[torch.argsort(work, descending=True, stable=True)], which[torch.argsort(tile, stable=True)]


def heads_together(total_k: int, num_heads_k: int, head_dim: int, itemsize: int) -> int:
    """How many heads of k and v a section takes: as many as fit into the cache, one at least."""
    size = 2 * total_k * head_dim * itemsize
    return max(1, min(num_heads_k, _SECTION_BYTES // max(size, 1)))


def _selected(which: torch.Tensor, *columns: torch.Tensor) -> Iterable[torch.Tensor]:
    """Of each column, the numbers of some pieces."""
    selected: Iterable[torch.Tensor] = torch.stack(columns).index_select(1, which)
    return selected

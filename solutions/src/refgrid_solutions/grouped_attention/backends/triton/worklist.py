"""What there is to do, as rows of integers that the kernels read: made once a plan, on the host, without heads.

Every head has the same tiles, so a list is of one head; a kernel finds head and tile of an item by arithmetic (see
items.py), in sections of heads whose keys fit into the cache together, the longest tiles of a section first.

In NumPy: its operations on a few hundred numbers take a fraction of the time of torch's, and start no threads, which on
a host whose cores are busy may take longer than all the rest.

A piece's rows see the more keys the further down they are: row i, counted from a piece's or a tile's first, sees the
first min(i + diagonal, num_keys) keys of its slice, none if that is negative. A full slice's diagonal is its num_keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from refgrid_solutions.grouped_attention.ranges import CAUSAL

# What is computed with, as rows times keys are more than 32 bits hold; and what the kernels read.
Numbers = npt.NDArray[np.int64]
Table = npt.NDArray[np.int32]

# Columns of the lists.
ROW_TILE = ("row", "rows", "key", "whole", "masked", "diagonal", "num_keys", "place")
KEY_TILE = ("key", "first_run", "last_run")

# Of an L2 cache of 50 MB: what the keys and values of one section may take.
_SECTION_BYTES = 32 * 2**20
# The copy engine reads float32 from multiples of this on.
_UNIT = 4


class Pieces(NamedTuple):
    """All rows of q: the slices and the gaps between them in the order of rows, a number of each an array."""

    row: Numbers
    last_row: Numbers
    key: Numbers
    num_keys: Numbers
    diagonal: Numbers
    last_place: Numbers
    num_rows: Numbers

    @property
    def places(self) -> int:
        """How many places the statistics of all rows take."""
        return int(self.last_place[-1]) if len(self.last_place) else 0

    @property
    def table(self) -> Table:
        """All but the last [n, 6]."""
        return np.array(self[:-1], np.int32).T.copy()


def pieces(columns: Numbers, total_q: int) -> Pieces:
    """The slices [5, n]; rows in none become pieces that see no key.

    last_place: where a piece's rows end among the statistics of rows. Each begins there at some distance from the one
    before, so that it ends at a multiple of four.
    """
    ordered = columns[:, np.lexsort(columns[::-1])]
    if int((ordered[1] - ordered[0]).sum()) < total_q:
        ordered = _with_gaps(ordered, total_q)
    row, last_row, key, last_key, mask_type = ordered
    num_rows, num_keys = last_row - row, last_key - key
    diagonal = num_keys - (num_rows - 1) * (mask_type == CAUSAL)
    last_place = (_quotient(num_rows, _UNIT) * _UNIT).cumsum()
    return Pieces(row, last_row, key, num_keys, diagonal, last_place, num_rows)


def _with_gaps(ordered: Numbers, total_q: int) -> Numbers:
    """Slices [5, n], and the rows in none as slices that see no key, all in order."""
    starts, ends = np.append(0, np.maximum.accumulate(ordered[1])), np.append(ordered[0], total_q)
    gaps = np.stack((starts, ends, *np.zeros((3, len(ends)), np.int64)))[:, starts < ends]
    return np.insert(ordered, (starts < ends).nonzero()[0], gaps, axis=1)


def row_tiles(of: Pieces, tile_rows: int, tile_keys: int) -> Table:
    """All rows of q in tiles of tile_rows, none of two pieces, those of the most blocks of tile_keys first [n, 8].

    Columns as ROW_TILE: the first row, how many rows, the slice's first key, blocks of so many keys that all rows see,
    then blocks that need a mask, the diagonal of the tile's first row, the slice's keys, the first row's place.
    """
    piece, number = _counted(_quotient(of.num_rows, tile_rows))
    above = number * tile_rows
    diagonal, num_keys = of.diagonal[piece] + above, of.num_keys[piece]
    rows = np.minimum(of.num_rows[piece] - above, tile_rows)
    whole = np.maximum(np.minimum(diagonal, num_keys), 0) // tile_keys
    blocks = _quotient(np.maximum(np.minimum(diagonal + rows - 1, num_keys), 0), tile_keys)
    place = (of.last_place - of.num_rows)[piece] + above
    tiles = (of.row[piece] + above, rows, of.key[piece], whole, blocks - whole, diagonal, num_keys, place)
    return _most_first(tiles, blocks)


def key_tiles(of: Pieces, total_k: int, tile_keys: int) -> tuple[Table, Table]:
    """All keys in tiles of tile_keys from key 0 on [n, 3], those of the most rows first; and their runs [m].

    Columns as KEY_TILE: the first key, and which runs are the tile's. A run is the number of a piece whose rows see the
    tile, in the order of rows; which rows, and where they need a mask, the kernel works out. Tiles that the same pieces
    see share their runs.
    """
    keys = np.arange(0, total_k, tile_keys)
    seen = of.num_keys * of.num_rows > 0
    first, last = of.key // tile_keys * seen, _quotient(of.key + of.num_keys, tile_keys) * seen
    first_run, last_run, runs = _runs(first, last, len(keys))
    most_rows = _rows_seeing(of, keys, first, last, tile_keys)
    return _most_first((keys, first_run, last_run), most_rows), runs


def heads_together(total_k: int, num_heads_k: int, head_dim: int, itemsize: int) -> int:
    """How many heads of k and v a section takes: as many as fit into the cache, one at least."""
    size = 2 * total_k * head_dim * itemsize
    return max(1, min(num_heads_k, _SECTION_BYTES // max(size, 1)))


def _runs(first: Numbers, last: Numbers, num_tiles: int) -> tuple[Numbers, Numbers, Table]:
    """Of each tile, where its runs begin and where they end; the runs.

    first, last: of each piece the first tile that it sees, and the first that it sees no more; both 0 of one that sees
    none. Tiles between two at which a piece begins or ends are a stretch: the same pieces see them.
    """
    turns = np.zeros(num_tiles + 1, np.int64)
    turns[0] = turns[first] = turns[last] = 1
    stretch = turns.cumsum()  # of each tile, from 1 on
    piece, stretches = _counted(stretch[last] - stretch[first], stretch[first])
    ends = np.bincount(stretches, minlength=num_tiles + 2).cumsum()
    # Pairs of a stretch and a piece as one number each, in order; the low half of a number is the piece.
    runs = np.sort((stretches << 32) + piece).astype(np.int32)
    return ends[stretch[:-1] - 1], ends[stretch[:-1]], runs


def _rows_seeing(of: Pieces, keys: Numbers, first: Numbers, last: Numbers, tile_keys: int) -> Numbers:
    """How many rows see each tile: of a piece those that see the tile's first key, or the slice's first key.

    Summed up along the tiles, from where a piece adds its rows (first), where they become fewer (turn), and where it
    ends (last): that takes a few numbers a piece, and one a tile.
    """
    see_first = of.num_rows + of.diagonal - 1
    most, end = np.minimum(of.num_rows, see_first), see_first + of.key
    turn = np.minimum(np.maximum((end - most) // tile_keys + 1, first), last)
    places, count = np.concatenate((first, turn, last)), len(keys) + 1
    level = np.bincount(places, np.concatenate((most, end - most, -end)), count)
    fewer = np.bincount(turn, minlength=count) - np.bincount(last, minlength=count)
    rows: Numbers = level.cumsum()[:-1] - keys * fewer.cumsum()[:-1]
    return rows


def _counted(counts: Numbers, first: Numbers | int = 0) -> tuple[Numbers, Numbers]:
    """Things of which there are so many each: of every one which it is of, and its number among those from first on."""
    which = np.arange(len(counts)).repeat(counts)
    return which, np.arange(len(which)) + (first + counts - counts.cumsum()).repeat(counts)


def _most_first(columns: Sequence[Numbers], most: npt.NDArray[Any]) -> Table:
    """As the kernels read it, row by row; those of which there is most come first, in order where it is the same."""
    return np.array(columns, np.int32).T.take(np.argsort(-most, kind="stable"), 0)


def _quotient(numbers: Numbers, by: int) -> Numbers:
    """Rounded up."""
    return (numbers + (by - 1)) // by

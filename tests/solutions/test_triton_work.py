"""The lists of work that the Triton kernels read: every visible pair of a row and a key once, the longest first."""

from __future__ import annotations

import sys
from itertools import chain, islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from grouped_layouts import Layout, Subject, planned
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_grouped import Entry, dense_mask

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

import triton
import triton.language as tl

from refgrid_solutions.grouped_attention.backends.triton import metadata, worklist
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE
from refgrid_solutions.grouped_attention.backends.triton.gradients import run_of
from refgrid_solutions.grouped_attention.backends.triton.worklist import KEY_TILE, ROW_TILE
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, Slice, rows_in_no_slice

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, KEYS = 4, 8
RUN = ("row", "place", "masked", "whole", "first_row", "first_key", "last_key", "diagonal")


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Entry], int, int]:
    cuts = sorted(draw(st.lists(st.integers(0, 40), max_size=8)))
    total_q, total_k = max([*cuts, draw(st.integers(0, 40))]), draw(st.integers(0, 40))
    entries = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        keys = sorted((draw(st.integers(0, total_k)), draw(st.integers(0, total_k))))
        entries.append((start, end, keys[0], keys[1], draw(st.sampled_from([FULL, CAUSAL]))))
    return draw(st.permutations(entries)), total_q, total_k


def pieces(entries: list[Entry], total_q: int) -> worklist.Pieces:
    return worklist.pieces(np.array(entries, np.int64).reshape(-1, 5).T, total_q)


def named(names: tuple[str, ...], table: Any) -> list[dict[str, int]]:
    return [dict(zip(names, row, strict=False)) for row in table.tolist()]


def row_tile_mask(tile: dict[str, int], total_q: int, total_k: int) -> torch.Tensor:
    """What a program that takes the tile lets its rows see: of whole blocks all, of masked ones what it should."""
    seen = torch.zeros(total_q, total_k, dtype=torch.int)
    for offset in range(tile["rows"]):
        count = max(min(offset + tile["diagonal"], tile["num_keys"]), 0)
        unmasked, last = KEYS * tile["whole"], KEYS * (tile["whole"] + tile["masked"])
        assert unmasked <= count <= last
        seen[tile["row"] + offset, tile["key"] : tile["key"] + count] += 1
    return seen


@given(groups())
def test_tiles_of_rows_are_all_rows_and_what_they_see(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    table = worklist.row_tiles(pieces(entries, total_q), ROWS, KEYS)
    tiles = named(ROW_TILE, table)

    assert sorted(row for tile in tiles for row in range(tile["row"], tile["row"] + tile["rows"])) == [*range(total_q)]
    assert all(1 <= tile["rows"] <= ROWS for tile in tiles)
    seen = sum((row_tile_mask(tile, total_q, total_k) for tile in tiles), torch.zeros(total_q, total_k))
    assert torch.equal(seen, dense_mask(entries, total_q, total_k).int())
    # No block for nothing: the last one holds a key that the last row sees.
    for tile in tiles:
        count = max(min(tile["rows"] - 1 + tile["diagonal"], tile["num_keys"]), 0)
        assert tile["whole"] + tile["masked"] == -(-count // KEYS)


@given(groups())
def test_the_longest_tiles_of_rows_come_first(drawn: tuple[list[Entry], int, int]) -> None:
    table = worklist.row_tiles(pieces(*drawn[:2]), ROWS, KEYS)
    tiles = named(ROW_TILE, table)

    assert all(one["whole"] + one["masked"] >= other["whole"] + other["masked"] for one, other in pairwise(tiles))


class Lists(NamedTuple):
    """As plain Python finds them, piece by piece and row by row: tiles of rows, pieces, tiles of keys, their runs."""

    rows: list[tuple[int, ...]]
    pieces: list[tuple[int, ...]]
    keys: list[tuple[int, ...]]
    runs: list[int]


def listed(entries: list[Entry], total_q: int, total_k: int, tile_rows: int, tile_keys: int) -> Lists:
    slices = [Slice(*entry) for entry in entries]
    gaps = [Slice(start, end, 0, 0, FULL) for start, end in rows_in_no_slice(slices, total_q)]
    rows, table, last_place = list[tuple[int, ...]](), list[tuple[int, ...]](), 0
    for piece in sorted([*slices, *gaps]):
        diagonal = piece.num_keys - (piece.num_rows - 1) * (piece.mask_type == CAUSAL)
        last_place += -(-piece.num_rows // 4) * 4
        table.append((*piece[:3], piece.num_keys, diagonal, last_place))
        for above in range(0, piece.num_rows, tile_rows):
            count, place = min(tile_rows, piece.num_rows - above), last_place - piece.num_rows + above
            whole, blocks = piece.visible(above) // tile_keys, -(-piece.visible(above + count - 1) // tile_keys)
            numbers = (whole, blocks - whole, diagonal + above, piece.num_keys, place)
            rows.append((piece.q_start + above, count, piece.k_start, *numbers))
    rows.sort(key=lambda tile: -(tile[3] + tile[4]))
    return Lists(rows, table, *listed_keys(sorted([*slices, *gaps]), total_k, tile_keys))


def listed_keys(every: list[Slice], total_k: int, tile_keys: int) -> tuple[list[tuple[int, ...]], list[int]]:
    tiles, runs, before, first = list[tuple[int, tuple[int, ...]]](), list[int](), list[int](), 0
    for key in range(0, total_k, tile_keys):
        seeing = [
            index
            for index, piece in enumerate(every)
            if piece.num_rows and max(piece.k_start, key) < min(piece.k_end, key + tile_keys)
        ]
        if seeing != before:
            before, first = seeing, len(runs)
            runs += seeing
        after = [(every[index], max(key - every[index].k_start, 0)) for index in seeing]
        rows = sum(piece.visible(row) > hidden for piece, hidden in after for row in range(piece.num_rows))
        tiles.append((rows, (key, first, len(runs))))
    return [tile for _, tile in sorted(tiles, key=lambda one: -one[0])], runs


@given(groups())
def test_lists_are_what_plain_python_finds(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    of = pieces(entries, total_q)
    keys, runs = worklist.key_tiles(of, total_k, KEYS)

    found = (worklist.row_tiles(of, ROWS, KEYS), of.table, keys, runs)
    assert [[*map(tuple, table.tolist())] for table in found[:3]] + [runs.tolist()] == [
        *listed(entries, total_q, total_k, ROWS, KEYS)
    ]
    assert {table.dtype for table in found} == {np.dtype(np.int32)}


@pytest.mark.parametrize("head_dim", TABLE)
def test_a_plan_of_many_groups_holds_these_lists(head_dim: int) -> None:
    groups = [(n * 19, (n + 1) * 19, n % 3, (n + 1) * 23, CAUSAL) for n in range(64)]
    layout, sizes = Layout(groups, 64 * 19 + 5, 64 * 23), TABLE[head_dim]

    plan = planned(layout, Subject("reference", head_dim=head_dim), backend="reference")
    host, forward, *backward = metadata(plan, both=True)

    rows, table, *_ = listed(*layout, *sizes.of_rows[:2])
    keys = listed(*layout, sizes.of_rows.rows, sizes.of_keys.keys)[2:]
    expected = (listed(*layout, *sizes.forward[:2]).rows, rows, table, *keys)
    for found, lists in zip((forward, *backward), expected, strict=True):
        assert torch.equal(found, torch.tensor(lists, dtype=torch.int32))
        assert found.is_contiguous()
    assert host.tolist() == [*chain(*sizes), table[-1][-1]]
    alone = metadata(plan, both=False)  # what the forward pass alone needs
    assert [part.tolist() for part in alone] == [host.tolist(), forward.tolist()]


@triton.jit
def _column(table: Any, index: Any, count: Any) -> Any:
    at = tl.arange(0, 1024)
    return tl.load(table + index * count + at, mask=at < count, other=0)


@triton.jit
def _work_out(found: Any, pieces: Any, keys: Any, count: Any, ROWS: tl.constexpr, KEYS: tl.constexpr) -> None:
    """Runs of pieces [6, count] and the tiles of keys that they see: [8, count], as the kernel works them out."""
    row, last_row, key = _column(pieces, 0, count), _column(pieces, 1, count), _column(pieces, 2, count)
    num_keys, diagonal, place = _column(pieces, 3, count), _column(pieces, 4, count), _column(pieces, 5, count)
    tile = _column(keys, 0, count)
    first, place, masked, whole, bounds = run_of(row, last_row, key, num_keys, diagonal, place, tile, ROWS, KEYS)
    numbers = (first, place, masked, whole, *bounds)
    at = tl.arange(0, 1024)
    for index in tl.static_range(8):
        tl.store(found + index * count + at, numbers[index], mask=at < count)


class Found(NamedTuple):
    """Tiles of keys, each with its runs."""

    tiles: list[dict[str, int]]
    runs: list[list[dict[str, int]]]


def worked_out(of: worklist.Pieces, total_k: int, tile_rows: int = ROWS, tile_keys: int = KEYS) -> Found:
    listed, numbers = worklist.key_tiles(of, total_k, tile_keys)
    tiles = named(KEY_TILE, listed)
    each = [numbers[tile["first_run"] : tile["last_run"]] for tile in tiles]
    keys = torch.tensor([tile["key"] for tile, own in zip(tiles, each, strict=True) for _ in own], dtype=torch.int32)
    found = torch.zeros(len(RUN), len(keys), dtype=torch.int32)
    if len(keys):
        table = torch.from_numpy(of.table[np.concatenate(each)].T.copy())
        _work_out[(1,)](found, table, keys, len(keys), tile_rows, tile_keys)
    runs = iter(named(RUN, found.T))
    return Found(tiles, [list(islice(runs, len(own))) for own in each])


def run_mask(tile: dict[str, int], run: dict[str, int], total_q: int, total_k: int) -> torch.Tensor:
    """What a program that takes the run adds to the tile's keys: whole blocks unmasked, the others within bounds."""
    seen = torch.zeros(total_q, total_k, dtype=torch.int)
    for block in range(run["masked"] + run["whole"]):
        for row in range(run["row"] + block * ROWS, run["row"] + (block + 1) * ROWS):
            first, last = tile["key"], tile["key"] + KEYS
            if block < run["masked"]:
                end = run["first_key"] if row < run["first_row"] else min(row + run["diagonal"], run["last_key"])
                first = max(first, run["first_key"])
                last = max(min(last, end), first)
            if first < last:
                assert 0 <= row < total_q
                assert last <= total_k
                seen[row, first:last] += 1
    return seen


@settings(deadline=None)
@given(groups())
def test_runs_of_tiles_of_keys_are_every_pair_once(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    found = worked_out(pieces(entries, total_q), total_k)

    assert sorted(tile["key"] for tile in found.tiles) == [*range(0, total_k, KEYS)]
    seen = torch.zeros(total_q, total_k, dtype=torch.int)
    for tile, runs in zip(*found, strict=True):
        for run in runs:
            assert run["masked"] >= 0
            assert run["whole"] >= 0
            seen += run_mask(tile, run, total_q, total_k)
    assert torch.equal(seen, dense_mask(entries, total_q, total_k).int())


@given(groups())
def test_runs_of_a_tile_of_keys_are_the_pieces_that_see_it_in_order(drawn: tuple[list[Entry], int, int]) -> None:
    of = pieces(*drawn[:2])
    tiles, runs = worklist.key_tiles(of, drawn[2], KEYS)

    for tile in named(KEY_TILE, tiles):
        overlaps = (of.key < tile["key"] + KEYS) & (of.key + of.num_keys > tile["key"])
        seeing = overlaps & (of.num_keys > 0) & (of.last_row > of.row)
        assert runs[tile["first_run"] : tile["last_run"]].tolist() == seeing.nonzero()[0].tolist()


def test_tiles_that_the_same_pieces_see_share_their_runs() -> None:
    of = pieces([(0, 64, 0, 4096, CAUSAL), (64, 128, 0, 8192, CAUSAL)], 128)
    tiles, runs = worklist.key_tiles(of, 8192, 64)

    assert len(tiles) == 128
    assert runs.tolist() == [0, 1, 1]


@given(groups())
def test_tiles_of_keys_that_most_rows_see_come_first(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    tiles, _ = worklist.key_tiles(pieces(entries, total_q), total_k, KEYS)
    mask = dense_mask(entries, total_q, total_k)
    rows = [int(mask[:, tile["key"] : tile["key"] + KEYS].any(1).sum()) for tile in named(KEY_TILE, tiles)]

    assert rows == sorted(rows, reverse=True)


@settings(deadline=None)
@given(groups())
def test_both_lists_agree_on_the_places_of_rows(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    of = pieces(entries, total_q)
    places = {
        tile["row"] + offset: tile["place"] + offset
        for tile in named(ROW_TILE, worklist.row_tiles(of, ROWS, KEYS))
        for offset in range(tile["rows"])
    }

    assert len(set(places.values())) == total_q
    assert all(0 <= place < int(of.places) for place in places.values())
    for run in chain.from_iterable(worked_out(of, total_k).runs):
        assert run["place"] % 4 == 0, "the copy engine cannot begin there"
        for row in range(max(run["row"], run["first_row"]), run["row"] + ROWS * (run["masked"] + run["whole"])):
            assert places[row] == run["place"] + row - run["row"]


def test_most_blocks_of_a_long_slice_need_no_mask() -> None:
    of = pieces([(0, 4096, 0, 8192, CAUSAL)], 4096)
    rows = named(ROW_TILE, worklist.row_tiles(of, 128, 128))
    runs = [*chain.from_iterable(worked_out(of, 8192, 64, 128).runs)]

    assert sum(tile["masked"] for tile in rows) == 32
    assert sum(run["masked"] for run in runs) == 2 * 32
    assert sum(run["whole"] for run in runs) == 2 * sum(tile["whole"] for tile in rows)


def test_a_section_is_what_the_cache_holds() -> None:
    for total_k, heads in ((1, 8), (8192, 8), (16384, 4), (65536, 1), (2**20, 1)):
        assert worklist.heads_together(total_k, 8, 128, 2) == heads

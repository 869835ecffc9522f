"""The lists of work that the Triton kernels read: every visible pair of a row and a key once, the longest first."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from naive_grouped import Entry, dense_mask

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

import interpreted_triton  # noqa: F401 - the package of the lists imports Triton

from refgrid_solutions.grouped_attention.backends.triton import worklist
from refgrid_solutions.grouped_attention.backends.triton.worklist import KEY_TILE, ROW_TILE, RUN, WIDTH
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, Slice

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, KEYS = 4, 8


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
    return worklist.pieces([Slice(*entry) for entry in entries], total_q)


def named(names: tuple[str, ...], table: torch.Tensor) -> list[dict[str, int]]:
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
    tiles = named(ROW_TILE, worklist.row_tiles(pieces(*drawn[:2]), ROWS, KEYS))

    assert all(one["whole"] + one["masked"] >= other["whole"] + other["masked"] for one, other in pairwise(tiles))


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
            assert first == last or 0 <= row < total_q
            assert last <= total_k or first == last
            if first < last:
                seen[row, first:last] += 1
    return seen


@given(groups())
def test_runs_of_tiles_of_keys_are_every_pair_once(drawn: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn
    tiles, runs = worklist.key_tiles(pieces(entries, total_q), total_k, ROWS, KEYS)
    found = named(KEY_TILE, tiles)
    listed = named(RUN, runs)

    assert sorted(tile["key"] for tile in found) == [*range(0, total_k, KEYS)]
    assert sorted(run for tile in found for run in range(tile["first_run"], tile["last_run"])) == [*range(len(listed))]
    seen = torch.zeros(total_q, total_k, dtype=torch.int)
    for tile in found:
        for run in listed[tile["first_run"] : tile["last_run"]]:
            seen += run_mask(tile, run, total_q, total_k)
    assert torch.equal(seen, dense_mask(entries, total_q, total_k).int())


@given(groups())
def test_the_longest_tiles_of_keys_come_first(drawn: tuple[list[Entry], int, int]) -> None:
    tiles, runs = worklist.key_tiles(pieces(*drawn[:2]), drawn[2], ROWS, KEYS)
    blocks = [run["masked"] + run["whole"] for run in named(RUN, runs)]
    lengths = [sum(blocks[tile["first_run"] : tile["last_run"]]) for tile in named(KEY_TILE, tiles)]

    assert lengths == sorted(lengths, reverse=True)


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
    assert all(0 <= place < int(of.last_place[-1]) for place in places.values())
    for run in named(RUN, worklist.key_tiles(of, total_k, ROWS, KEYS)[1]):
        assert run["place"] % 4 == 0, "the copy engine cannot begin there"
        for row in range(max(run["row"], run["first_row"]), run["row"] + ROWS * (run["masked"] + run["whole"])):
            assert places[row] == run["place"] + row - run["row"]


def test_most_blocks_of_a_long_slice_need_no_mask() -> None:
    of = pieces([(0, 4096, 0, 8192, CAUSAL)], 4096)
    rows = named(ROW_TILE, worklist.row_tiles(of, 128, 128))
    runs = named(RUN, worklist.key_tiles(of, 8192, 64, 128)[1])

    assert sum(tile["masked"] for tile in rows) == 32
    assert sum(run["masked"] for run in runs) == 2 * 32
    assert sum(run["whole"] for run in runs) == 2 * sum(tile["whole"] for tile in rows)


def test_a_section_is_what_the_cache_holds() -> None:
    for total_k, heads in ((1, 8), (8192, 8), (16384, 4), (65536, 1), (2**20, 1)):
        assert worklist.heads_together(total_k, 8, 128, 2) == heads


def test_the_tables_are_parts_of_one_copy() -> None:
    tables = torch.arange(2 * WIDTH).view(2, WIDTH), torch.zeros(0, WIDTH, dtype=torch.int64), torch.ones(1, WIDTH)

    there = worklist.copied(torch.device("cpu"), *tables)

    assert len({part.untyped_storage().data_ptr() for part in there}) == 1
    assert all(part.dtype == torch.int32 and part.data_ptr() % 16 == 0 for part in there)
    assert all(torch.equal(one, other.int()) for one, other in zip(there, tables, strict=True))

"""Programs that stay, as tests/bench_staying.py times them: the same bits as one a tile, or no time."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

import bench_staying
import interpreted_triton
from bench_staying import TILES, Staying, timed
from grouped_bench.shapes import prefixes
from grouped_bench.ways import Problem, problem

from refgrid_solutions.grouped_attention.backends.triton import worklist
from refgrid_solutions.grouped_attention.backends.triton.attention import attended
from refgrid_solutions.grouped_attention.backends.triton.configurations import Tiles

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = Tiles(32, 16, 4, 2)


@pytest.fixture
def of() -> Problem:
    return problem(prefixes(3, 40, (2, 1)), torch.device("cpu"), torch.float16)


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("programs", [1, 5, 12])
def test_all_items_are_done_by_any_number_of_programs_call_after_call(
    of: Problem, programs: int, counted: bool
) -> None:
    pieces = worklist.pieces(of.plan(of.shape.pieces).table.numpy(), of.shape.total_q)
    work = torch.from_numpy(worklist.row_tiles(pieces, SMALL.rows, SMALL.keys))
    staying = Staying(of, work, 1, SMALL, counted)
    assert staying.items == 12  # two tiles of each group, of two heads

    with interpreted_triton.completed():
        expected = attended(of.q, of.k, of.v, 128**-0.5, work, 1, SMALL)
        for _ in range(2):
            found, _ = staying.launched(programs)
            assert all(map(torch.equal, found, expected))


def test_a_way_that_gives_other_bits_is_not_timed(of: Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, off = torch.zeros(2), torch.tensor([0.0, 1e-30])
    ways = {"one": lambda: (zeros, zeros), "dealt": lambda: (zeros, zeros), "taken": lambda: (zeros, off)}
    monkeypatch.setattr(bench_staying, "ways", lambda *_: ways)

    with pytest.raises(RuntimeError, match="groups-3x40-h2: 'taken' gives other bits than 'one', with Tiles"):
        timed(of, TILES[0], 1)

"""Whether programs that stay are faster: the forward kernel of grouped attention in Triton, one tile a program or many.

    PYTHONPATH=solutions/src:tests python3 tests/bench_staying.py [--rounds 15] [--output results/grouped/staying.json]

on a GPU.

Three ways to hand out the items of the work list, the same code for a tile: a program an item, as the backend
launches it; as many programs as fit at once, of which each takes every n-th item; and those, taking the next item from
a counter whenever they are done. Times are of CUDA graphs, in turns, which the counter's reset is part of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from bench_triton import Case, only
from grouped_bench.shapes import HEAD_DIM, shapes
from grouped_bench.timing import Times, replayed
from grouped_bench.ways import Problem, problem

from refgrid_solutions.grouped_attention.backends import triton as backend
from refgrid_solutions.grouped_attention.backends.triton.attention import attended, one_tile
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Tiles
from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, described

SHAPES = (
    *("zigzag-8B-4K-w8-r0", "zigzag-8B-4K-w8-r7", "zigzag-8B-8K-w1-r0", "zigzag-8B-8K-w8-r7"),
    *("zigzag-8B-32K-w8-r0", "zigzag-8B-32K-w8-r7", "zigzag-70B-64K-w8-r7", "groups-16x1024-h32", "groups-8x512-h32"),
)
TILES = (TABLE[HEAD_DIM].forward, Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2))
# Of an H200's processor.
_REGISTERS, _SHARED_MEMORY = 65536, 233472

Pair = tuple[torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["num_tiles", "heads", "section", "group", "total_q", "items"])
def stay(
    q_desc: tl.tensor_descriptor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    out: tl.tensor,
    lse: tl.tensor,
    work: tl.tensor,
    counter: tl.tensor,
    scale: tl.tensor,
    num_tiles: tl.tensor,
    heads: tl.tensor,
    section: tl.tensor,
    group: tl.tensor,
    total_q: tl.tensor,
    items: tl.tensor,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """As attend, all items: of n programs each takes every n-th, or if COUNTED the next by a counter that was 0."""
    tensors, counts = (q_desc, k_desc, v_desc, out, lse, work), (num_tiles, heads, section, group, total_q)
    if COUNTED:
        item = tl.atomic_add(counter, 1)
        while item < items:
            one_tile(item, tensors, scale, counts, ROWS, KEYS, WIDTH, STAGES)
            item = tl.atomic_add(counter, 1)
    else:
        for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=1):
            one_tile(item, tensors, scale, counts, ROWS, KEYS, WIDTH, STAGES)


class Staying:
    """Launches of stay for one list of work, to be given the number of programs."""

    def __init__(self, of: Problem, work: torch.Tensor, section: int, tiles: Tiles, counted: bool) -> None:
        self._of, self._work, self._section, self._tiles, self._counted = of, work, section, tiles, counted
        self._counter = torch.zeros(1, dtype=torch.int32, device=of.q.device)
        self.items = len(work) * of.q.shape[1]

    def launched(self, programs: int) -> tuple[Pair, Any]:
        """out and lse as attended gives them, and the compiled kernel."""
        (q, k, v), tiles = (self._of.q, self._of.k, self._of.v), self._tiles
        (total_q, heads, width), group = q.shape, q.shape[1] // k.shape[1]
        out, lse = q.new_empty(q.shape), q.new_empty((heads, total_q), dtype=torch.float32)
        if self._counted:
            self._counter.zero_()
        compiled = stay[(programs,)](
            *(described(q, tiles.rows), described(k, tiles.keys), described(v, tiles.keys)),
            *(out, lse, self._work, self._counter, width**-0.5 * LOG2_E),
            *(len(self._work), heads, self._section * group, group, total_q, self.items),
            *(self._counted, tiles.rows, tiles.keys, width, tiles.stages),
            num_warps=tiles.warps,
        )
        return (out, lse), compiled

    def as_many_as_fit(self) -> Callable[[], Pair]:
        """A call with so many programs; compiled now."""
        _, compiled = self.launched(self.items)
        programs = min(self.items, resident(compiled, self._tiles, self._of.q.device))
        return lambda: self.launched(programs)[0]


def ways(of: Problem, tiles: Tiles) -> dict[str, Callable[[], Pair]]:
    """Each hand-out of a shape's work, by its name."""
    with only(Case("forward", HEAD_DIM, tiles)):
        plan = of.plan(of.shape.pieces, "triton")
    _, (work, *_), _ = backend._unpacked(plan)
    section = backend._section(plan)
    staying = {
        name: Staying(of, work, section, tiles, counted).as_many_as_fit()
        for name, counted in (("dealt", False), ("taken", True))
    }
    return {"one": partial(attended, of.q, of.k, of.v, HEAD_DIM**-0.5, work, section, tiles), **staying}


def resident(compiled: Any, tiles: Tiles, device: torch.device) -> int:
    """How many programs of the kernel an H200 holds at once, by registers and shared memory."""
    compiled._init_handles()
    registers, shared = int(compiled.n_regs), int(compiled.metadata.shared)
    # Registers are given to a warp in eights, and a kilobyte of each program's memory is the system's.
    allotted = -(-registers // 8) * 8 * 32 * tiles.warps
    a_processor = min(_REGISTERS // allotted, _SHARED_MEMORY // (shared + 1024))
    return max(1, a_processor) * int(torch.cuda.get_device_properties(device).multi_processor_count)


def timed(of: Problem, tiles: Tiles, rounds: int) -> dict[str, Any]:
    """A row: the median of each way in ms, lowest and highest. RuntimeError if a way does not give the same bits."""
    calls = ways(of, tiles)
    expected = calls["one"]()
    for name, call in calls.items():
        if not all(map(torch.equal, call(), expected)):
            raise RuntimeError(f"{of.shape.name}: {name!r} gives other bits than 'one', with {tiles}")
    times = replayed(calls, of.q.device, rounds)
    over = {name: _rounded(*times[name].speedup(times["one"])) for name in times if name != "one"}
    return {"shape": of.shape.name, "tiles": [*tiles], "ms": _told(times), "times_as_fast_as_one": over}


def _told(times: dict[str, Times]) -> dict[str, list[float]]:
    return {name: _rounded(of.median, *of.spread) for name, of in times.items()}


def _rounded(*numbers: float) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]


def main() -> None:
    """Every shape with every size of tiles, a line each as it is timed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, help="a file of JSON")
    asked = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows, by_name = [], {shape.name: shape for shape in shapes()}
    for name, tiles in product(SHAPES, TILES):
        rows.append(timed(problem(by_name[name], device), tiles, asked.rounds))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    told = {
        "what": " ".join((__doc__ or "").split("\n\n")[-1].split()),
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rounds": asked.rounds,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    if asked.output:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        told_first = json.dumps(told, indent=1)[:-2]
        asked.output.write_text(f'{told_first},\n "rows": [\n  {lines}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()

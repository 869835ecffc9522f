"""Whether programs that stay are faster: the forward kernel of grouped attention in Triton, one tile a program or many.

    PYTHONPATH=solutions/src:tests python3 tests/bench_staying.py [--rounds 15] [--output results/grouped/staying.json]

on a GPU. Three ways to hand out the items of the work list, the same code for a tile: a program an item, as the backend
launches it; as many programs as fit at once, of which each takes every n-th item; and those, taking the next item from
a counter whenever they are done. Times are of CUDA graphs, in turns, which the counter's reset is part of.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from grouped_bench.shapes import shapes
from grouped_bench.timing import Times, replayed

from refgrid_solutions.grouped_attention import GroupedAttnPlan, plan_grouped_attn
from refgrid_solutions.grouped_attention.backends import triton as backend
from refgrid_solutions.grouped_attention.backends.triton.attention import attended, one_tile
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Tiles
from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, described

HEAD_DIM = 128
SHAPES = (
    *("zigzag-8B-4K-w8-r0", "zigzag-8B-4K-w8-r7", "zigzag-8B-8K-w1-r0", "zigzag-8B-8K-w8-r7"),
    *("zigzag-8B-32K-w8-r0", "zigzag-8B-32K-w8-r7", "zigzag-70B-64K-w8-r7", "groups-16x1024-h32", "groups-8x512-h32"),
)
TILES = (TABLE[HEAD_DIM].forward, Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2))
_SPECIALIZED = ["num_tiles", "heads", "section", "group", "total_q", "items"]


@triton.jit(do_not_specialize=_SPECIALIZED)
def dealt(
    q_desc: tl.tensor_descriptor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    out: tl.tensor,
    lse: tl.tensor,
    work: tl.tensor,
    scale: tl.tensor,
    num_tiles: tl.tensor,
    heads: tl.tensor,
    section: tl.tensor,
    group: tl.tensor,
    total_q: tl.tensor,
    items: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Every n-th item of n programs."""
    tensors, counts = (q_desc, k_desc, v_desc, out, lse, work), (num_tiles, heads, section, group, total_q)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=1):
        one_tile(item, tensors, scale, counts, ROWS, KEYS, WIDTH, STAGES)


@triton.jit(do_not_specialize=_SPECIALIZED)
def taken(
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
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """The next item that no program has, by a counter that is 0 before the launch."""
    tensors, counts = (q_desc, k_desc, v_desc, out, lse, work), (num_tiles, heads, section, group, total_q)
    item = tl.atomic_add(counter, 1)
    while item < items:
        one_tile(item, tensors, scale, counts, ROWS, KEYS, WIDTH, STAGES)
        item = tl.atomic_add(counter, 1)


Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]


class Problem:
    """A shape's tensors, drawn once, and its work list for tiles of one size."""

    def __init__(self, name: str, device: torch.device) -> None:
        """ValueError if no shape has this name."""
        found = {shape.name: shape for shape in shapes()}
        if name not in found:
            raise ValueError(f"shape = {name!r}, but should be one of: {', '.join(found)}")
        self.shape = found[name]
        heads = (self.shape.heads[0], *2 * (self.shape.heads[1],))
        counts = (self.shape.total_q, *2 * (self.shape.total_k,))
        draw = torch.Generator(device).manual_seed(0)
        self.tensors = [
            torch.randn(count, many, HEAD_DIM, generator=draw, device=device, dtype=torch.bfloat16)
            for count, many in zip(counts, heads, strict=True)
        ]
        self.scale = HEAD_DIM**-0.5

    def plan(self) -> GroupedAttnPlan:
        """For the tiles that the table holds now."""
        pieces = self.shape.pieces
        return plan_grouped_attn(
            *([piece[:2] for piece in pieces], [piece[2:4] for piece in pieces], [piece[4] for piece in pieces]),
            total_q=self.shape.total_q,
            total_k=self.shape.total_k,
            head_dim=HEAD_DIM,
            num_heads_q=self.shape.heads[0],
            num_heads_k=self.shape.heads[1],
            dtype=torch.bfloat16,
            device=self.tensors[0].device,
            backend="triton",
            backward=False,
        )

    def ways(self, tiles: Tiles) -> Iterator[tuple[str, Call]]:
        """Each hand-out of this work, by its name."""
        before = TABLE[HEAD_DIM]
        TABLE[HEAD_DIM] = before._replace(forward=tiles)
        try:
            plan = self.plan()
        finally:
            TABLE[HEAD_DIM] = before
        _, (work, *_), _ = backend._unpacked(plan)
        section = backend._section(plan)
        q, k, v = self.tensors
        yield "one", lambda: attended(q, k, v, self.scale, work, section, tiles)
        for name, kernel in (("dealt", dealt), ("taken", taken)):
            yield name, self._staying(kernel, work, section, tiles)

    def _staying(self, kernel: Any, work: torch.Tensor, section: int, tiles: Tiles) -> Call:
        q, k, v = self.tensors
        (total_q, heads, _), group = q.shape, q.shape[1] // k.shape[1]
        items = len(work) * heads
        counter = torch.zeros(1, dtype=torch.int32, device=q.device)
        programs = {"found": items}

        def call() -> tuple[torch.Tensor, torch.Tensor]:
            out, lse = q.new_empty(q.shape), q.new_empty((heads, total_q), dtype=torch.float32)
            own = [counter.zero_()] if kernel is taken else []
            compiled = kernel[(min(programs["found"], items),)](
                *(described(q, tiles.rows), described(k, tiles.keys), described(v, tiles.keys)),
                *(out, lse, work, *own, self.scale * LOG2_E, len(work), heads, section * group, group, total_q, items),
                *(tiles.rows, tiles.keys, HEAD_DIM, tiles.stages),
                num_warps=tiles.warps,
            )
            programs["found"] = resident(compiled, tiles, q.device)
            return out, lse

        call()  # compiled, and with as many programs from now on as fit
        return call


def resident(compiled: Any, tiles: Tiles, device: torch.device) -> int:
    """How many programs of the kernel an H200 holds at once, by registers and shared memory."""
    compiled._init_handles()
    registers, shared = int(compiled.n_regs), int(compiled.metadata.shared)
    a_processor = min(65536 // (-(-registers // 8) * 8 * 32 * tiles.warps), 233472 // (shared + 1024))
    return max(1, a_processor) * int(torch.cuda.get_device_properties(device).multi_processor_count)


def timed(problem: Problem, tiles: Tiles, rounds: int) -> dict[str, Any]:
    """A row: the median of each way in ms, lowest and highest. RuntimeError if a way does not give the same bits."""
    ways = dict(problem.ways(tiles))
    expected = ways["one"]()
    for name, call in ways.items():
        for found, wanted in zip(call(), expected, strict=True):
            if not torch.equal(found, wanted):
                raise RuntimeError(f"{problem.shape.name}: {name!r} gives other bits than 'one', with {tiles}")
    times = replayed(ways, problem.tensors[0].device, rounds)
    over = {name: _rounded(*times[name].speedup(times["one"])) for name in times if name != "one"}
    return {"shape": problem.shape.name, "tiles": [*tiles], "ms": _told(times), "times_as_fast_as_one": over}


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
    rows = []
    for name, tiles in product(SHAPES, TILES):
        rows.append(timed(Problem(name, device), tiles, asked.rounds))
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    told = {
        "what": " ".join((__doc__ or "").split("\n\n")[2].split()),
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

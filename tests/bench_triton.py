"""Which tiles are fast: the Triton kernels of grouped attention with every size of them that compiles well.

    PYTHONPATH=solutions/src:tests python3 tests/bench_triton.py [--head-dim 128] [--only forward] [--seconds 240]

on a GPU prints a line for each kernel and size: the median of launches, operations a second as a plan counts them, and
the error against the reference. Kernels are compiled by many processes first. The best belong into configurations.py;
where there is no GPU, `resources` tells which are worth trying.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from grouped_layouts import CAUSAL, FULL, Layout, Subject, drawn, planned, zigzag

from refgrid_solutions.grouped_attention import GroupedAttnPlan
from refgrid_solutions.grouped_attention.backends import naive, triton
from refgrid_solutions.grouped_attention.backends.triton import differentiation
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Tiles

CANDIDATES: dict[tuple[str, int], list[Tiles]] = {
    ("forward", 128): [
        *(Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 4)),
        *(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2)),
    ],
    ("forward", 64): [
        *(Tiles(128, 128, 8, 3), Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 3)),
        *(Tiles(64, 128, 4, 2), Tiles(64, 128, 4, 3), Tiles(64, 64, 4, 4)),
    ],
    ("of_rows", 128): [
        *(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3)),
    ],
    ("of_rows", 64): [
        *(Tiles(128, 128, 8, 2), Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 2)),
        *(Tiles(64, 128, 4, 2), Tiles(64, 64, 4, 3)),
    ],
    ("of_keys", 128): [
        *(Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3), Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3)),
    ],
    ("of_keys", 64): [
        *(Tiles(64, 128, 8, 3), Tiles(64, 128, 8, 2), Tiles(64, 128, 8, 4), Tiles(128, 128, 8, 2)),
        *(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 128, 4, 2)),
    ],
}
# Products of a kernel, in halves of what the plan counts forward.
PRODUCTS = {"forward": 2, "of_rows": 3, "of_keys": 4}
LAYOUTS = {
    "causal 8K": Layout([(0, 8192, 0, 8192, CAUSAL)], 8192, 8192),
    "zigzag 32K, rank 0 of 8": zigzag([32768], 0, 8),
    "zigzag 32K, rank 7 of 8": zigzag([32768], 7, 8),
}
TINY = Layout([(0, 200, 0, 300, CAUSAL), (200, 300, 0, 300, FULL)], 300, 300)


class Case(NamedTuple):
    """One kernel with tiles of one size."""

    kernel: str
    head_dim: int
    tiles: Tiles


class Inputs(NamedTuple):
    """Of one layout: the plan, q, k, v and dout, and what the reference makes of them."""

    layout: Layout
    subject: Subject
    tensors: tuple[torch.Tensor, ...]
    expected: dict[str, torch.Tensor]


@contextmanager
def only(case: Case) -> Iterator[None]:
    """The table with the case's tiles."""
    before = TABLE[case.head_dim]
    TABLE[case.head_dim] = before._replace(**{case.kernel: case.tiles})
    try:
        yield
    finally:
        TABLE[case.head_dim] = before


def launch_of(case: Case, inputs: Inputs) -> tuple[GroupedAttnPlan, Callable[[], dict[str, torch.Tensor]]]:
    """The plan, and a launch of the case's kernel alone, which gives its outputs by name."""
    with only(case):
        plan = planned(inputs.layout, inputs.subject)
        plan.prepare("triton")
    q, k, v, dout = inputs.tensors
    scale = case.head_dim**-0.5
    out, lse = triton.forward(q, k, v, plan, scale)
    sizes, work = triton._going_back(plan)
    told = differentiation.Told(dout, q, k, v, differentiation._summarized(out, dout, lse, work, sizes.of_rows))

    def launch() -> dict[str, torch.Tensor]:
        if case.kernel == "forward":
            return {"out": triton.forward(q, k, v, plan, scale)[0]}
        if case.kernel == "of_rows":
            return {"dq": differentiation._of_rows(told, scale, work, sizes.of_rows)}
        dk, dv = differentiation._of_keys(told, scale, work, sizes.of_keys)
        return {"dk": dk, "dv": dv}

    return plan, launch


def inputs_of(layout: Layout, head_dim: int, *, checked: bool) -> Inputs:
    """Drawn once; the reference takes its time."""
    subject = Subject("triton", "cuda", heads=(32, 8), head_dim=head_dim)
    q, k, v = drawn(layout, subject)
    dout = torch.randn_like(q)
    expected = {}
    if checked:
        plan, scale = planned(layout, subject), head_dim**-0.5
        out, lse = naive.forward(q, k, v, plan, scale)
        gradients = naive.backward(dout, q, k, v, out, lse, plan, scale)
        expected = {"out": out, **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}
    return Inputs(layout, subject, (q, k, v, dout), expected)


def compile_one(case: Case) -> str:
    """In a process of its own: what goes wrong, or nothing. The kernel stays in Triton's cache."""
    try:
        launch_of(case, inputs_of(TINY, case.head_dim, checked=False))[1]()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 - the others are still to be timed
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return ""


def seconds(launch: Callable[[], Any]) -> float:
    """The median of some launches, each timed on the device."""
    for _ in range(3):
        launch()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(15)]
    for start, end in marks:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in marks]
    return statistics.median(times) / 1e3


def error_of(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The norm of all differences over the norm of what was expected, the largest of the outputs'."""
    pairs = [(found[name].float(), expected[name].float()) for name in found if name in expected]
    return max((float((one - other).norm() / other.norm()) for one, other in pairs), default=float("nan"))


def report(case: Case, name: str, inputs: Inputs) -> None:
    plan, launch = launch_of(case, inputs)
    error, time_taken = error_of(launch(), inputs.expected), seconds(launch)
    rate = plan.forward_flops * PRODUCTS[case.kernel] / 2 / time_taken / 1e12
    tiles = "x".join(map(str, case.tiles[:2])) + f" w{case.tiles.warps} s{case.tiles.stages}"
    say(case.kernel, case.head_dim, name, tiles, time_taken, rate, error)


def report_whole(head_dim: int, name: str, inputs: Inputs) -> None:
    """The whole way back through the table's kernels, replayed as a graph: no time of the host's."""
    q, k, v, dout = inputs.tensors
    scale = head_dim**-0.5
    plan = planned(inputs.layout, inputs.subject)
    plan.prepare("triton")
    out, lse = triton.forward(q, k, v, plan, scale)
    told = dout, q, k, v, out, lse, plan, scale
    error = error_of(dict(zip(("dq", "dk", "dv"), triton.backward(*told), strict=True)), inputs.expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        triton.backward(*told)
    time_taken = seconds(graph.replay)
    say("backward", head_dim, name, "whole", time_taken, plan.backward_flops / time_taken / 1e12, error)


def say(kernel: str, head_dim: int, name: str, what: str, time_taken: float, rate: float, error: float) -> None:
    """A line of the table."""
    times = f"{time_taken * 1e6:9.1f} us {rate:6.1f} TFLOP/s"
    write(f"{kernel:9} {head_dim:4} {name:24} {what:14} {times} error {error:.1e}")


def write(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Compile, then time until the time is over; the order is that of the candidates, the table's own first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, choices=TABLE, action="append")
    parser.add_argument("--only", choices=PRODUCTS, action="append")
    parser.add_argument("--seconds", type=float, default=240)
    asked = parser.parse_args()
    start = time.perf_counter()
    cases = [
        Case(kernel, head_dim, tiles)
        for (kernel, head_dim), candidates in CANDIDATES.items()
        for tiles in candidates
        if head_dim in (asked.head_dim or TABLE) and kernel in (asked.only or PRODUCTS)
    ]
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn")) as pool:
        faults = dict(zip(cases, pool.map(compile_one, cases), strict=True))
    write(f"# {len(cases)} kernels compiled in {time.perf_counter() - start:.0f} s")
    for case, fault in faults.items():
        if fault:
            write(f"# {case.kernel} {case.head_dim} {case.tiles} fails: {fault}")
    timed(asked.head_dim or TABLE, [case for case in cases if not faults[case]], start + asked.seconds)


def timed(head_dims: Iterable[int], cases: list[Case], end: float) -> None:
    """All cases at every layout, until the clock reaches the end."""
    for head_dim, (name, layout) in product(head_dims, LAYOUTS.items()):
        inputs = inputs_of(layout, head_dim, checked=name == "causal 8K")
        report_whole(head_dim, name, inputs)
        for case in cases:
            if time.perf_counter() > end:
                write("# the time is over")
                return
            if case.head_dim == head_dim:
                report(case, name, inputs)


if __name__ == "__main__":
    main()

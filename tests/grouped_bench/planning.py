"""What the host takes to plan many groups: rows as of any other time, with the host's processor and its load."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from grouped_bench.report import PLAN, Row
from grouped_bench.shapes import HEAD_DIM, prefixes
from grouped_bench.timing import Times, in_turns
from grouped_bench.ways import Problem
from refgrid_solutions.grouped_attention import backends

GROUPS = 64
_ROUNDS = 1001  # the host may have others to serve: the median of many


def planned(earlier: Sequence[Row], names: Sequence[str], device: torch.device, kind: str) -> list[Row]:
    """A row a backend; none of those that this host has already under this torch, unless others kept it busy then.

    On a CPU the plans are those for an H200, not copied to it.
    """
    host, load = _host(), round(os.getloadavg()[0], 1)
    own = {"device": kind, "torch": torch.__version__, "host": host}
    known = [row for row in earlier if row["mode"] == PLAN and own.items() <= row.items()]
    done = {row["way"] for row in known if _busy(load) or not _busy(row["load"])}
    if {f"{name}: plan" for name in ("auto", *names)} <= done:
        return []
    with ExitStack() as stack:
        if device.type == "cpu":
            _as_on_a_gpu(stack)
        found = list(_timed(names, device))
    return [{**row, **own, "load": load} for row in found if row["way"] not in done]


def _busy(load: float) -> bool:
    """This host, by others: more than half of its processors."""
    return load > (os.cpu_count() or 1) / 2


def _as_on_a_gpu(stack: ExitStack) -> None:
    import pytest
    from varlen_kernels import backends_of_a_gpu

    patch = stack.enter_context(pytest.MonkeyPatch.context())
    stack.enter_context(backends_of_a_gpu(patch))
    if importlib.util.find_spec("triton"):
        patch.setattr(backends.load("triton"), "refuses", lambda _: "")
        patch.setattr(backends, "choose", lambda _: ("fa3", "triton"))


def _timed(names: Sequence[str], device: torch.device) -> Iterator[Row]:
    shape = prefixes(GROUPS, 256, (32, 8))
    rows, keys = (torch.empty(shape.total_q, heads, HEAD_DIM, dtype=torch.bfloat16, device=device) for heads in (32, 8))
    of = Problem(shape, rows, keys, keys, rows)
    able = [name for name in names if not backends.refusal(name, of.plan(shape.pieces))]
    ways = {name: lambda name=name: of.plan(shape.pieces, backend=name) for name in ["auto", *able]}
    for name, times in in_turns(ways, torch.device("cpu"), _ROUNDS).items():
        common: Row = {"shape": shape.name, "kind": "planning", "tokens": shape.tokens, "stride": 0, "pass": "planning"}
        yield {**common, "mode": PLAN, "way": f"{name}: plan", "rounds": _ROUNDS, **_told(times), "speedups": {}}


def _told(times: Times) -> dict[str, Any]:
    low, high = times.spread
    first, _, third = statistics.quantiles(times.rounds, n=4)
    told = {"median_ms": times.median, "lowest_ms": low, "highest_ms": high, "first_ms": first, "third_ms": third}
    return {name: float(f"{value:.5g}") for name, value in told.items()}


def _host() -> str:
    """The processor's name, and what tells it from others of that name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    told = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    name = told.get("model name", platform.machine())
    kind = f", family {told['cpu family']} model {told['model']}" if {"cpu family", "model"} <= told.keys() else ""
    return f"{name}{kind}, {os.cpu_count()} cores"

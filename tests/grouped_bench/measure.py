"""Times shapes one after the other; each becomes lines of a file as soon as it was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from grouped_bench.pace import Pace
from grouped_bench.parallel import parallel_ways
from grouped_bench.planning import GROUPS, planned
from grouped_bench.report import BYTES, PLAN, Row, read
from grouped_bench.shapes import Shape
from grouped_bench.timing import Times, in_turns, replayed
from grouped_bench.ways import backward_ways, forward_ways, problem

_PASSES: dict[str, Callable[..., tuple[Mapping[str, Callable[[], object]], dict[str, str]]]] = {
    "forward": forward_ways,
    "forward + backward": backward_ways,
    "context parallel": parallel_ways,
}
# The origin's algorithm reads offsets from the device in every step: no graph can hold that.
_EAGER_ONLY = {"context parallel"}


def measure(
    chosen: Sequence[Shape], backends: Sequence[str], rounds: int, device: torch.device, file: Path
) -> list[str]:
    """Append a row for each way, mode and pass to the file; what it holds already is not measured again.

    -> what could not be measured, or was while the GPU was slow; the rest was.
    """
    console = Console()
    plan(backends, device, file, lambda line: console.print(line, highlight=False))
    earlier = read(file) if file.exists() else []
    done = {(row["shape"], row["pass"]) for row in earlier if row["mode"] not in {BYTES, PLAN}}
    pace, failed = Pace(earlier, device, _device_name(device)), []
    for number, (shape, name) in enumerate(product(chosen, _PASSES), 1):
        if (shape.name, name) in done:
            continue
        try:
            told = _appended(file, pace.kept(partial(_rows, shape, name, backends, rounds, device)))
        except Exception as error:  # noqa: BLE001 - the others are still to be timed, and the command ends 1
            failed.append(f"{shape.name}, {name}")
            told = f"[red]{type(error).__name__}[/]: {escape(str(error))}"
        console.print(f"{number} of {len(chosen) * len(_PASSES)} {shape.name}, {name}: {told}", highlight=False)
    return failed


def _appended(file: Path, rows: Sequence[Row]) -> str:
    """What is told of them."""
    _append(file, rows)
    return "; ".join(_short(row) for row in rows if "median_ms" in row)


def _append(file: Path, rows: Sequence[Row]) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(json.dumps(row) + "\n" for row in rows)


def plan(backends: Sequence[str], device: torch.device, file: Path, say: Callable[[str], object]) -> None:
    """Append what this host takes to plan many groups, for each backend that can run them, unless it is there."""
    earlier = read(file) if file.exists() else []
    found = planned(earlier, backends, device, _device_name(device))
    _append(file, found)
    for row in found:
        say(f"plan of {GROUPS} groups, {row['way']} {row['median_ms']:.3f} ms")


def _short(row: Row) -> str:
    return f"{row['way']} {row['mode']} {row['median_ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s"


def _rows(shape: Shape, name: str, backends: Sequence[str], rounds: int, device: torch.device) -> Iterator[Row]:
    """A row for each way and mode, and for each backend that cannot run it."""
    of = problem(shape, device)
    plan = of.plan(shape.pieces)
    flops = plan.forward_flops + (plan.backward_flops if name != "forward" else 0)
    ways, refused = _PASSES[name](of, backends)
    union, reads = shape.key_bytes
    common: Row = {
        "shape": shape.name,
        "kind": shape.kind,
        "model": shape.model,
        "tokens": shape.tokens,
        "world": shape.world,
        "rank": shape.rank,
        "stride": shape.stride,
        "pass": name,
        "rounds": rounds,
        "device": _device_name(device),
        "torch": torch.__version__,
        "key_bytes": union,
        "key_reads": reads,
    }
    for way, reason in refused.items():
        yield {**common, "mode": "", "way": way, "refused": reason}
    graphs = device.type == "cuda" and name not in _EAGER_ONLY
    modes = {"eager": in_turns, **({"graph": replayed} if graphs else {})}
    for mode, timed in modes.items():
        times = timed(ways, device, rounds) if ways else {}
        for way, own in times.items():
            yield {**common, "mode": mode, "way": way, **_told(own, flops), "speedups": _speedups(way, times)}


def _told(times: Times, flops: int) -> dict[str, Any]:
    low, high = times.spread
    told = {"median_ms": times.median, "lowest_ms": low, "highest_ms": high}
    return {name: rounded(value) for name, value in {**told, "tflops": flops / times.median / 1e9}.items()}


def _speedups(way: str, times: dict[str, Times]) -> dict[str, tuple[float, float, float]]:
    """Of a grouped call over everything else that was timed with it."""
    if not way.endswith("grouped"):
        return {}
    others = {other: times[way].speedup(theirs) for other, theirs in times.items() if other != way}
    return {other: tuple(map(rounded, told)) for other, told in others.items()}  # type: ignore[misc] # three of three


def rounded(value: float) -> float:
    """To five digits: more than the times are good for."""
    return float(f"{value:.5g}")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()

"""`python -m grouped_bench`: time the shapes that are asked for, write a line each, then tables and a plot of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console

from grouped_bench.report import Row, markdown, plot, read, write_csv
from grouped_bench.shapes import Shape, shapes
from grouped_bench.timing import Times, in_turns, replayed
from grouped_bench.ways import BACKENDS, Call, backward_ways, forward_ways, problem

_FOLDER = click.Path(file_okay=False, path_type=Path)
_PASSES: dict[str, Callable[..., tuple[dict[str, Call], dict[str, str]]]] = {
    "forward": forward_ways,
    "forward + backward": backward_ways,
}


@click.command()
@click.option("--shapes", "pattern", default="*", show_default=True, help="Names of shapes, such as zigzag-8B-*.")
@click.option("--backends", default=",".join(BACKENDS[:3]), show_default=True, help="Which, if they can run here.")
@click.option("--rounds", default=15, show_default=True, help="How often each way has its turn.")
@click.option("--device", default="cuda", show_default=True, help="cpu times nothing of interest; it tests this.")
@click.option("--output", type=_FOLDER, default="results/grouped", show_default=True, help="Folder of what is written.")
@click.option("--render", is_flag=True, help="Only write the tables and the plot of what was measured before.")
@click.option("--list", "listed", is_flag=True, help="Only list the shapes.")
def main(pattern: str, backends: str, rounds: int, device: str, output: Path, *, render: bool, listed: bool) -> None:
    """Time grouped attention beside what it replaces; a shape that was measured is not measured again."""
    chosen = [shape for shape in shapes() if fnmatch(shape.name, pattern)]
    if listed:
        click.echo("\n".join(shape.name for shape in chosen))
        return
    if not chosen:
        raise click.UsageError(f"--shapes {pattern!r} is none; --list tells them")
    output.mkdir(parents=True, exist_ok=True)
    file = output / "grouped.jsonl"
    if not render:
        _measure(chosen, backends.split(","), rounds, torch.device(device), file)
    rows = read(file)
    write_csv(rows, output / "grouped.csv")
    (output / "grouped.md").write_text(markdown(rows), encoding="utf-8")
    plot(rows, output / "grouped.png")
    click.echo(f"written: {output}/grouped.csv, grouped.md, grouped.png")


def _measure(chosen: list[Shape], backends: list[str], rounds: int, device: torch.device, file: Path) -> None:
    console = Console()
    done = {(row["shape"], row["pass"]) for row in read(file)} if file.exists() else set()
    with file.open("a", encoding="utf-8") as opened:
        for number, shape in enumerate(chosen, 1):
            for name in _PASSES:
                if (shape.name, name) in done:
                    continue
                rows = list(_rows(shape, name, backends, rounds, device))
                opened.writelines(json.dumps(row) + "\n" for row in rows)
                opened.flush()
                told = "; ".join(
                    _short(row) for row in rows if row["mode"] in ("graph", "eager") and "median_ms" in row
                )
                console.print(f"{number} of {len(chosen)} {shape.name}, {name}: {told}", highlight=False)


def _short(row: Row) -> str:
    return f"{row['way']} {row['mode']} {row['median_ms']:.3f} ms, {row['tflops']:.0f} TFLOP/s"


def _rows(shape: Shape, name: str, backends: list[str], rounds: int, device: torch.device) -> Iterator[Row]:
    """A row for each way and mode, and for each backend that cannot run it."""
    of = problem(shape, device)
    plan = of.plan(shape.pieces)
    flops = plan.forward_flops + (plan.backward_flops if name != "forward" else 0)
    ways, refused = _PASSES[name](of, backends)
    union, read_often = shape.key_bytes
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
        "key_reads": read_often,
    }
    for way, reason in refused.items():
        yield {**common, "mode": "", "way": way, "refused": reason}
    modes = {"eager": in_turns, **({"graph": replayed} if device.type == "cuda" else {})}
    for mode, timed in modes.items():
        times = timed(ways, device, rounds) if ways else {}
        for way, own in times.items():
            yield {**common, "mode": mode, "way": way, **_told(own, flops), "speedups": _speedups(way, times)}


def _told(times: Times, flops: int) -> dict[str, Any]:
    low, high = times.spread
    told = {"median_ms": times.median, "lowest_ms": low, "highest_ms": high}
    return {**told, "tflops": flops / times.median / 1e9}


def _speedups(way: str, times: dict[str, Times]) -> dict[str, tuple[float, float, float]]:
    """Of a grouped call over everything else that was timed with it."""
    if not way.endswith("grouped"):
        return {}
    return {other: times[way].speedup(theirs) for other, theirs in times.items() if other != way}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


if __name__ == "__main__":
    main()

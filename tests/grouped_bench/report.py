"""What was measured, as CSV, as a table in Markdown, and as a plot; all from the rows that a run wrote."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

Row = dict[str, Any]

BYTES = "bytes"  # the mode of rows that tell no time, but what was read from memory
PLAN = "plan"  # of rows that tell a host's time
FEWEST_RESAMPLED = 7  # rounds: fewer values drawn again and again are no interval

_COLOURS = {
    "fa3": "tab:blue",
    "triton": "tab:green",
    "torch": "tab:orange",
    "PyTorch": "tab:red",
    "flashinfer": "tab:gray",
}

FIELDS = (
    *("shape", "kind", "model", "tokens", "world", "rank", "stride", "pass", "mode", "way"),
    *("median_ms", "lowest_ms", "highest_ms", "tflops", "over", "speedup", "speedup_low", "speedup_high"),
    *("key_bytes", "key_reads", "read_bytes", "rounds", "device", "torch"),
)


def read(file: Path) -> list[Row]:
    """Rows of a run, one a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_csv(rows: Iterable[Row], file: Path) -> None:
    """A line for each time on the device, and one more for each way that a grouped call is held against."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if row["mode"] != PLAN and ("median_ms" in row or "read_bytes" in row):
                writer.writerow(row)
            for over, (speedup, low, high) in row.get("speedups", {}).items():
                writer.writerow({**row, "over": over, "speedup": speedup, "speedup_low": low, "speedup_high": high})


def markdown(rows: Sequence[Row], shapes: Iterable[str] = ()) -> str:
    """A table a backend, pass, kind and mode; a line a shape, with how much faster a grouped call is than each way.

    shapes: names of all that could be timed; those that were not are listed.
    """
    timed = [row for row in rows if "median_ms" in row]
    lines = ["# Grouped attention, timed", "", _told(rows), "", "## What was timed beside", "", *_beside(timed)]
    grouped = [row for row in timed if row["speedups"]]
    for part in dict.fromkeys(map(_part, grouped)):
        lines += ["", f"## {', '.join(part)}", "", *_table([row for row in grouped if _part(row) == part])]
    counted = [row for row in rows if row["mode"] == BYTES]
    if counted:
        lines += ["", "## Bytes read from memory, forward", "", *_traffic(counted)]
    if plans := latest_plans(rows):
        lines += ["", "## Plans of 64 groups, by the host", "", *_plans(plans)]
    refused = {(row["way"], row["refused"], row["shape"]) for row in rows if "refused" in row}
    if missing := Counter((way, why) for way, why, _ in sorted(refused)):
        lines += ["", "## Not run", "", *(f"- {way}, in {n} shapes: {why}" for (way, why), n in missing.items())]
    times = {row["shape"] for row in timed if row["mode"] != PLAN}
    if untimed := [shape for shape in shapes if shape not in times]:
        lines += ["", f"## Not timed: {len(untimed)} of {len(times) + len(untimed)} shapes", "", ", ".join(untimed)]
    return "\n".join(lines) + "\n"


def _part(row: Row) -> tuple[str, ...]:
    return _backend(row), row["kind"], row["pass"], row["mode"]


def _backend(row: Row) -> str:
    return str(row["way"].partition(":")[0])


def plot(rows: Sequence[Row], file: Path) -> None:
    """TFLOP/s over tokens of every way, replayed as graphs, zigzag with eight ranks; a colour a backend."""
    from matplotlib.figure import Figure

    figure, drawn = Figure(figsize=(12, 8), layout="constrained"), {}
    panels = product(("forward", "forward + backward"), ("8B", "70B"))
    for axes, (what, model) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        own = [row for row in rows if _plotted(row, what, model)]
        for way in dict.fromkeys(row["way"] for row in own):
            points = sorted((row["tokens"], row["tflops"]) for row in own if row["way"] == way)
            (drawn[way],) = axes.plot(*zip(*points, strict=True), **_style(way), label=way)
        axes.set(title=f"{what}, Llama3-{model} heads, rank 7 of 8", xlabel="tokens", ylabel="TFLOP/s")
        axes.set_xscale("log", base=2)
        ticks = sorted({row["tokens"] for row in own})
        axes.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
        axes.set_ylim(bottom=0)
    figure.legend(handles=list(drawn.values()), loc="outside right center", fontsize="small")
    figure.savefig(file, dpi=110)


def _style(way: str) -> dict[str, str]:
    """Whose it is by colour; a grouped call is a full line."""
    backend, _, what = way.partition(": ")
    lines = {"grouped": "-", "launches in order": "--", "a stream each": "-.", "dense, as many FLOPs": ":"}
    return {"color": _COLOURS.get(backend, "black"), "linestyle": lines.get(what, "-"), "marker": "."}


def _plotted(row: Row, what: str, model: str) -> bool:
    wanted = {"kind": "zigzag", "model": model, "world": 8, "rank": 7, "stride": 0, "pass": what, "mode": "graph"}
    return "tflops" in row and all(row.get(name) == value for name, value in wanted.items())


def _told(rows: Sequence[Row]) -> str:
    first = next((row for row in rows if "device" in row), {})
    where = f"On {first.get('device', 'nothing')}, torch {first.get('torch', '?')}"
    rounds = " or ".join(map(str, sorted({r["rounds"] for r in rows if "rounds" in r and r["mode"] != PLAN}))) or "no"
    return (
        f"{where}: medians of {rounds} rounds in turns, with the lowest and the highest; how often "
        "a grouped call fits into the time of each other way, and in brackets where that lies in 95 of 100 resamples; "
        f"of fewer than {FEWEST_RESAMPLED} rounds, too few to resample, the lowest and the highest, in round brackets. "
        "FLOPs are those of visible pairs. Eager: with what the host takes to launch; graph: CUDA graphs, without. "
        "`PyTorch: context parallel` is this benchmark's own writing of what PyTorch launches, FlashAttention-2 for a "
        "shard after the other and their merge, without its exchange. `launches in order`: one a slice. "
        f"{_paced(rows)} [Which goals this meets](goals.md)."
    )


def _paced(rows: Sequence[Row]) -> str:
    """Beside how many passes a product of matrices tells what the GPU could."""
    passes = {(row["shape"], row["pass"]) for row in rows if "tflops" in row}
    found = {(row["shape"], row["pass"]): row["matmul_tflops"] for row in rows if "matmul_tflops" in row}
    if not found:
        return f"No product of matrices was timed beside any of the {len(passes)} passes; from the next run on one is."
    low, high = min(found.values()), max(found.values())
    return f"Beside {len(found)} of {len(passes)} passes a product of matrices ran at {low:.0f} to {high:.0f} TFLOP/s."


def _beside(rows: Sequence[Row]) -> Iterator[str]:
    """In how many shapes each way stood beside a grouped call; of context parallelism, of those with several ranks."""
    yield "| pass | way | timed in | of shapes |"
    yield "|---" * 4 + "|"
    for name, of in {(row["pass"], row["way"].partition(":")[0]): None for row in rows if "tflops" in row}:
        own = [row for row in rows if row["pass"] == name and row["way"].partition(":")[0] == of]
        shapes = {row["shape"] for row in rows if row["pass"] == name and (of != "PyTorch" or row["world"] > 1)}
        for way in dict.fromkeys(row["way"] for row in own if not row["way"].endswith("grouped")):
            yield f"| {name} | {way} | {len({row['shape'] for row in own if row['way'] == way})} | {len(shapes)} |"


def latest_plans(rows: Iterable[Row]) -> list[Row]:
    """The last of each host and way: those before are of a time when others kept the host busy."""
    own = (row for row in rows if row["mode"] == PLAN)
    return list({tuple(row[name] for name in ("way", "host", "device", "torch")): row for row in own}.values())


def _plans(rows: Sequence[Row]) -> Iterator[str]:
    """Of each host, in the median and between the quarters; others may have had its processors, as its load tells."""
    yield "| plan | host | load | for | torch | rounds | ms | middle half | lowest to highest |"
    yield "|---" * 9 + "|"
    for row in rows:
        told = "{median_ms:.3f} | {first_ms:.3f} to {third_ms:.3f} | {lowest_ms:.3f} to {highest_ms:.3f}".format(**row)
        cells = [row[name] for name in ("way", "host", "load", "device", "torch", "rounds")]
        yield f"| {' | '.join(map(str, cells))} | {told} |"
    yield ""
    yield "For a CPU: the plans of an H200, made on this host and not copied to a device."


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """Of one backend: its own other ways, then those of PyTorch and FlashInfer."""
    others = [way for way in dict.fromkeys(way for row in rows for way in row["speedups"]) if _comparable(rows[0], way)]
    named = [way.removeprefix(f"{_backend(rows[0])}: ") for way in others]
    paced = any("matmul_tflops" in row for row in rows)
    product_head = ["product of matrices"] if paced else []
    yield f"| {' | '.join(['shape', 'ms', 'TFLOP/s', *product_head, *(f'over {way}' for way in named)])} |"
    yield "|---" * (len(others) + 3 + paced) + "|"
    for row in rows:
        cells = [_speedup(row["speedups"][way], row) if way in row["speedups"] else "" for way in others]
        if paced:
            cells = [f"{row['matmul_tflops']:.0f}" if "matmul_tflops" in row else "", *cells]
        ms = "{median_ms:.3f} ({lowest_ms:.3f} to {highest_ms:.3f})".format(**row)
        yield f"| {row['shape']} | {ms} | {row['tflops']:.0f} | {' | '.join(cells)} |"


def _traffic(rows: Sequence[Row]) -> Iterator[str]:
    """In MB, by all kernels of a call; q is read besides k and v."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    yield f"| shape | k and v once | k and v for every slice | {' | '.join(ways)} |"
    yield "|---" * (len(ways) + 3) + "|"
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = {row["way"]: row for row in rows if row["shape"] == shape}
        first = next(iter(own.values()))
        read_by = [f"{own[way]['read_bytes'] / 1e6:.1f}" if way in own else "" for way in ways]
        told = [f"{first[name] / 1e6:.1f}" for name in ("key_bytes", "key_reads")]
        yield f"| {shape} | {' | '.join([*told, *read_by])} |"


def _comparable(row: Row, way: str) -> bool:
    """Another backend's ways are in tables of their own."""
    return way.partition(":")[0] in (_backend(row), "PyTorch", "flashinfer")


def _speedup(told: Sequence[float], row: Row) -> str:
    return f"{told[0]:.2f} {interval(told, row, 2)}"


def interval(told: Sequence[float], row: Row, digits: int) -> str:
    """Where a speedup lies in resamples; of few rounds these end at the lowest and the highest, and it says those."""
    low, high = (f"{each:.{digits}f}" for each in told[1:])
    return f"({low} to {high})" if row["rounds"] < FEWEST_RESAMPLED else f"[{low}, {high}]"

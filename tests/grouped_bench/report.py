"""What was measured, as CSV, as a table in Markdown, and as a plot; all from the rows that a run wrote."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

FIELDS = (
    *("shape", "kind", "model", "tokens", "world", "rank", "stride", "pass", "mode", "way"),
    *("median_ms", "lowest_ms", "highest_ms", "tflops", "over", "speedup", "speedup_low", "speedup_high"),
    *("key_bytes", "key_reads", "rounds", "device", "torch"),
)


def read(file: Path) -> list[Row]:
    """Rows of a run, one a line."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_csv(rows: Iterable[Row], file: Path) -> None:
    """A line for each time, and one more for each way that a grouped call is held against."""
    with file.open("w", newline="", encoding="utf-8") as opened:
        writer = csv.DictWriter(opened, FIELDS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            if "median_ms" in row:
                writer.writerow(row)
            for over, (speedup, low, high) in row.get("speedups", {}).items():
                writer.writerow({**row, "over": over, "speedup": speedup, "speedup_low": low, "speedup_high": high})


def markdown(rows: Sequence[Row]) -> str:
    """A table a pass and kind; a line a shape and mode, with the way that is fastest and what grouping gains."""
    lines = ["# Grouped attention, timed", "", _told(rows)]
    for what in dict.fromkeys((row["pass"], row["kind"]) for row in rows if "median_ms" in row):
        own = [row for row in rows if (row["pass"], row["kind"]) == what and "median_ms" in row]
        lines += ["", f"## {what[1]}, {what[0]}", "", *_table(own)]
    missing = dict.fromkeys((row["way"], row["refused"]) for row in rows if "refused" in row)
    if missing:
        lines += ["", "## Not run", "", *(f"- {way}: {why}" for way, why in missing)]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], file: Path) -> None:
    """TFLOP/s over tokens of every way, forward, replayed as graphs, zigzag with eight ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axes, model in zip(figure.subplots(1, 2, sharey=True), ("8B", "70B"), strict=True):
        own = [row for row in rows if _plotted(row, model)]
        for way in dict.fromkeys(row["way"] for row in own):
            points = sorted((row["tokens"], row["tflops"]) for row in own if row["way"] == way)
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
        axes.set(title=f"Llama3-{model} heads, zigzag, rank 7 of 8", xlabel="tokens", xscale="log", ylabel="TFLOP/s")
        if own:
            axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=120)


def _plotted(row: Row, model: str) -> bool:
    wanted = {"kind": "zigzag", "model": model, "world": 8, "rank": 7, "stride": 0, "pass": "forward", "mode": "graph"}
    return "tflops" in row and all(row.get(name) == value for name, value in wanted.items())


def _told(rows: Sequence[Row]) -> str:
    first = next((row for row in rows if "device" in row), {})
    where = f"On {first.get('device', 'nothing')}, torch {first.get('torch', '?')}"
    return (
        f"{where}: medians of {first.get('rounds', 0)} rounds in turns; in brackets where the speedup lies in 95 "
        "of 100 resamples. FLOPs are those of visible pairs."
    )


def _table(rows: Sequence[Row]) -> list[str]:
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = [f"| shape | mode | {' | '.join(f'{way}, TFLOP/s' for way in ways)} | what grouping gains |"]
    lines.append("|---" * (len(ways) + 3) + "|")
    for shape, mode in dict.fromkeys((row["shape"], row["mode"]) for row in rows):
        own = {row["way"]: row for row in rows if (row["shape"], row["mode"]) == (shape, mode)}
        cells = [f"{own[way]['tflops']:.0f}" if way in own else "" for way in ways]
        lines.append(f"| {shape} | {mode} | {' | '.join(cells)} | {'; '.join(_gains(own.values()))} |")
    return lines


def _gains(rows: Iterable[Row]) -> Iterable[str]:
    """Of each backend's grouped call over its own launches and over the others' single ways."""
    for row in rows:
        backend = row["way"].partition(":")[0]
        for over, (speedup, low, high) in row.get("speedups", {}).items():
            if over.startswith(f"{backend}:") or not over.endswith(("grouped", "order", "each", "FLOPs")):
                other = over.removeprefix(f"{backend}: ")
                yield f"{backend} {speedup:.2f}x [{low:.2f}, {high:.2f}] over {other}"

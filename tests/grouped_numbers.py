"""Rows of grouped attention's times, as both READMEs tell them: what is said is derived, and held against the text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from grouped_bench.report import Row, read

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results/grouped"
EVERY = read(RESULTS / "grouped.ndjson")
ROWS = [row for row in EVERY if "median_ms" in row]
IN_ORDER, DENSE = "fa3: launches in order", "fa3: dense, as many FLOPs"


def grouped(way: str, name: str, mode: str, fits: Callable[[Row], bool] = lambda _: True) -> list[Row]:
    found = [r for r in ROWS if (r["way"], r["pass"], r["mode"]) == (f"{way}: grouped", name, mode) and fits(r)]
    assert found, f"{way}, {name}, {mode}: nothing was timed"
    return found


def one(shape: str, way: str, name: str, mode: str) -> Row:
    (found,) = grouped(way, name, mode, lambda row: row["shape"] == shape)
    return found


def spread(told: list[float], digits: int = 0) -> str:
    low, high = (f"{each:.{digits}f}" for each in (min(told), max(told)))
    return low if low == high else f"{low} to {high}"


def speedups(way: str, name: str, mode: str, over: str, fits: Callable[[Row], bool] = lambda _: True) -> list[float]:
    own = (row["speedups"] for row in grouped(way, name, mode, fits))
    return [each[over][0] for each in own if over in each]


def percent(way: str, name: str, mode: str, over: str, fits: Callable[[Row], bool]) -> str:
    return f"{spread([100 * (each - 1) for each in speedups(way, name, mode, f'{way}: {over}', fits)])} %"


def all_heads(fits: Callable[[Row], bool]) -> list[Row]:
    """Grouped forward calls of fa3 of the rows of a rank."""
    return grouped("fa3", "forward", "graph", lambda row: row["kind"] == "zigzag" and row["stride"] == 0 and fits(row))


def unsaid(file: str, derived: Iterable[str]) -> list[str]:
    """What of the derived the file does not say, however it breaks its lines."""
    said = " ".join((ROOT / file).read_text().split())
    return [told for told in derived if " ".join(told.split()) not in said]

"""Which goals the rows meet: every shape that was timed counts, whatever its heads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from grouped_bench.report import Row, interval, latest_plans

_BACKENDS = ("fa3", "triton", "torch")
_ORIGIN = "the origin's algorithm"
_ORDER, _STREAMS, _DENSE = "launches in order", "a stream each", "dense, as many FLOPs"


class Found(NamedTuple):
    """What one shape came to, and between what, as it is printed."""

    what: str
    value: float
    between: str
    one_head: bool


@dataclass(frozen=True)
class Goal:
    """What must be reached, and what would be fine, by everything that `found` finds; `most`: it must stay below."""

    says: str
    must: float
    stretch: float | None
    found: Callable[[Sequence[Row]], list[Found]]
    unit: str = "x"
    most: bool = False

    def reached(self, value: float, aim: float) -> bool:
        """Whether one shape is as good as that."""
        return value < aim if self.most else value >= aim

    def told(self, value: float) -> str:
        """With its unit."""
        digits = {"x": 3, " ms": 2}.get(self.unit, 0)
        return f"{value:.{digits}f}{self.unit}"


def goals() -> Iterator[Goal]:
    """One for each backend where it is a backend's own doing."""
    for name in _BACKENDS:
        for tokens, must, stretch in ((65536, 1.05, 1.1), (8192, 1.5, 4.0)):
            says = f"{name}: zigzag, forward + backward, {tokens // 1024}K, over the origin's algorithm"
            yield Goal(says, must, stretch, _ratios("context parallel", name, _ORIGIN, _long(tokens, tokens)))
    yield Goal("fa3: forward over a dense call of as many FLOPs", 0.97, 1.0, _ratios("forward", "fa3", _DENSE))
    for name in _BACKENDS:
        two = f"{name}: forward over two launches"
        long, short = _long(16384), _long(4096, 8192)
        yield Goal(f"{two}, 16K and up", 1.0, 1.04, _ratios("forward", name, _ORDER, long))
        yield Goal(f"{two}, 4K to 8K", 1.03, 1.16, _ratios("forward", name, _ORDER, short))
    for name in _BACKENDS:
        says = f"{name}: 8 to 16 groups of at most 1K rows over a launch each"
        yield Goal(says, 2.0, 4.0, _ratios("forward", name, _ORDER, _small_groups))
    for name in _BACKENDS:
        says = f"{name}: 16 groups of 4 rows on the same 64K keys over a launch each"
        yield Goal(says, 4.0, 8.0, _ratios("forward", name, _ORDER, lambda row: row["shape"] == "shared-16x4-64K"))
    yield Goal("triton: forward", 430, 560, _forward_tflops, " TFLOP/s")
    yield Goal("triton: backward, as both passes less the forward one", 280, 400, _backward_tflops, " TFLOP/s")
    yield Goal("plan of 64 groups", 1.0, None, _plans, " ms", most=True)


def _long(least: int, most: float = float("inf")) -> Callable[[Row], bool]:
    return lambda row: row["kind"] == "zigzag" and least <= row["tokens"] <= most


def _small_groups(row: Row) -> bool:
    found = re.match(r"groups-(\d+)x(\d+)-", row["shape"])
    return found is not None and 8 <= int(found[1]) <= 16 and int(found[2]) <= 1024


def _of(rows: Sequence[Row], name: str, backend: str) -> list[Row]:
    """Grouped calls of one backend in one pass: as graphs, where there are any."""
    mode = "eager" if name == "context parallel" else "graph"
    return [row for row in rows if (row["pass"], row["mode"], row["way"]) == (name, mode, f"{backend}: grouped")]


def _ratios(
    name: str, backend: str, way: str, counts: Callable[[Row], bool] = lambda _: True
) -> Callable[[Sequence[Row]], list[Found]]:
    over = f"{backend}: {way}"

    def found(rows: Sequence[Row]) -> list[Found]:
        own = [row for row in _of(rows, name, backend) if counts(row) and over in row["speedups"]]
        told = [(row, row["speedups"][over]) for row in own]
        return [Found(row["shape"], each[0], interval(each, row, 3), row["stride"] == 1) for row, each in told]

    return found


def _forward_tflops(rows: Sequence[Row]) -> list[Found]:
    return [Found(r["shape"], r["tflops"], _between(r), r["stride"] == 1) for r in _of(rows, "forward", "triton")]


def _between(row: Row) -> str:
    """In the slowest round and in the fastest."""
    low, high = (row["tflops"] * row["median_ms"] / row[name] for name in ("highest_ms", "lowest_ms"))
    return f"({low:.0f} to {high:.0f})"


def _backward_tflops(rows: Sequence[Row]) -> list[Found]:
    """A difference of two medians has no interval."""
    forward = {row["shape"]: row for row in _of(rows, "forward", "triton")}
    both = [
        (row, forward[row["shape"]]) for row in _of(rows, "forward + backward", "triton") if row["shape"] in forward
    ]
    return [Found(row["shape"], _less(row, first), "", row["stride"] == 1) for row, first in both]


def _less(both: Row, forward: Row) -> float:
    """TFLOP/s of what the forward pass leaves of both."""
    work = [row["tflops"] * row["median_ms"] for row in (both, forward)]
    return float((work[0] - work[1]) / (both["median_ms"] - forward["median_ms"]))


def _plans(rows: Sequence[Row]) -> list[Found]:
    own = latest_plans(rows)
    between = "({lowest_ms:.2f} to {highest_ms:.2f})"
    return [Found(f"{row['way']}, {row['host']}", row["median_ms"], between.format(**row), False) for row in own]


def page(rows: Sequence[Row]) -> str:
    """The goals in Markdown, what missed them, and the shapes of which a goal speaks by name."""
    timed = [row for row in rows if "median_ms" in row]
    lines = ["# Goals of grouped attention", "", _HEAD, "", *_table(timed)]
    lines += ["", "## What missed", "", *_missed(timed)]
    lines += ["", "## Which backend took the least time", "", *_fastest(timed)]
    for title, counts in _SECTIONS.items():
        own = [row for row in timed if row["speedups"] and row["mode"] == "graph" and counts(row)]
        lines += ["", f"## {title}", "", *_beside(own)]
    return "\n".join(lines) + "\n"


_HEAD = (
    "Medians of every shape in [the tables](grouped.md), one key head at a time (`heads_k_stride` 1, names that end in "
    "`-s1`) among them; a shape meets a goal where its median does. CUDA graphs, but eager beside the origin's "
    "algorithm. In square brackets an interval as in the tables, in round ones the lowest and the highest. Two "
    "launches, and those of small groups, are the same backend's, one a slice."
)
_SECTIONS: dict[str, Callable[[Row], bool]] = {
    "Groups that share their keys": lambda row: row["kind"] == "shared keys" and row["pass"] == "forward",
    "One key head at a time, forward": lambda row: row["stride"] == 1 and row["pass"] == "forward",
    "One key head at a time, forward + backward": lambda row: (
        row["stride"] == 1 and row["pass"] == "forward + backward"
    ),
}


def _table(rows: Sequence[Row]) -> Iterator[str]:
    yield "| goal | must | shapes | that meet it | worst | | verdict | stretch | verdict |"
    yield "|---" * 9 + "|"
    for goal in goals():
        found = goal.found(rows)
        worst = _from_worst(goal, found)[:1]
        told = [f"{each.what} | {goal.told(each.value)} {each.between}".rstrip() for each in worst] or [" | "]
        meet = len(found) - len(_short_of(goal, found, goal.must))
        stretch = ["", ""] if goal.stretch is None else [_aim(goal, goal.stretch), verdict(goal, found, goal.stretch)]
        cells = [goal.says, _aim(goal, goal.must), str(len(found)), str(meet), *told, verdict(goal, found, goal.must)]
        yield f"| {' | '.join([*cells, *stretch])} |"


def _aim(goal: Goal, aim: float) -> str:
    return f"{'under ' if goal.most else ''}{aim:{'g' if goal.unit != 'x' else '.2f'}}{goal.unit}"


def _from_worst(goal: Goal, found: Sequence[Found]) -> list[Found]:
    return sorted(found, key=lambda each: each.value, reverse=goal.most)


def _short_of(goal: Goal, found: Sequence[Found], aim: float) -> list[Found]:
    return [each for each in _from_worst(goal, found) if not goal.reached(each.value, aim)]


def verdict(goal: Goal, found: Sequence[Found], aim: float) -> str:
    """What nobody timed is not met."""
    if not found:
        return "not timed"
    short = len(_short_of(goal, found, aim))
    return f"missed in {short} of {len(found)}" if short else "met"


def _missed(rows: Sequence[Row]) -> Iterator[str]:
    for goal in goals():
        short = _short_of(goal, goal.found(rows), goal.must)
        if not short:
            continue
        told = ", ".join(f"{each.what} {goal.told(each.value)} {each.between}".rstrip() for each in short)
        heads = sum(each.one_head for each in short)
        yield f"- {goal.says}{f', {heads} of them one key head at a time' if heads else ''}: {told}."


def grouped_times(rows: Sequence[Row], name: str) -> dict[str, dict[str, float]]:
    """Milliseconds of each backend, by the shapes of a pass of which more than one was timed."""
    found: dict[str, dict[str, float]] = {}
    for row in (row for backend in _BACKENDS for row in _of(rows, name, backend)):
        found.setdefault(row["shape"], {})[row["way"].partition(":")[0]] = row["median_ms"]
    return {shape: times for shape, times in found.items() if len(times) > 1}


def _fastest(rows: Sequence[Row]) -> Iterator[str]:
    yield f"| pass | shapes | {' | '.join(_BACKENDS)} | `triton` over the time of `fa3` |"
    yield "|---" * 6 + "|"
    for name in ("forward", "forward + backward"):
        times = grouped_times(rows, name)
        least = [min(own, key=own.__getitem__) for own in times.values()]
        both = [(own["triton"] / own["fa3"], shape) for shape, own in times.items() if {"fa3", "triton"} <= own.keys()]
        ends = [f"{each:.2f} ({shape})" for each, shape in (min(both), max(both))] if both else []
        yield f"| {name} | {len(times)} | {' | '.join(str(least.count(n)) for n in _BACKENDS)} | {' to '.join(ends)} |"


def _place(row: Row) -> tuple[int, str, int]:
    return row["tokens"], row["shape"], _BACKENDS.index(row["way"].partition(":")[0])


def _beside(rows: Sequence[Row]) -> Iterator[str]:
    """A line a shape and backend."""
    ways = (_ORDER, _STREAMS, _DENSE)
    yield f"| shape | backend | ms | {' | '.join(f'over {way}' for way in ways)} |"
    yield "|---" * (3 + len(ways)) + "|"
    for row in sorted(rows, key=_place):
        backend = row["way"].partition(":")[0]
        told = [row["speedups"].get(f"{backend}: {way}") for way in ways]
        cells = [f"{each[0]:.3f} {interval(each, row, 3)}" if each else "" for each in told]
        yield f"| {row['shape']} | {backend} | {row['median_ms']:.3f} | {' | '.join(cells)} |"

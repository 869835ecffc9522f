"""What both READMEs say of grouped attention's times: as the committed rows have it, so that no number gets stale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from grouped_bench.goals import grouped_times, page
from grouped_bench.report import Row, interval, markdown, read
from grouped_bench.shapes import shapes
from grouped_numbers import (
    DENSE,
    EVERY,
    IN_ORDER,
    RESULTS,
    ROWS,
    all_heads,
    grouped,
    one,
    percent,
    speedups,
    spread,
    unsaid,
)

COUNTED = {(row["shape"], row["way"]): row for row in EVERY if "read_bytes" in row}
LAUNCHES = [f"{way}: {what}" for way in ("fa3", "triton") for what in ("grouped", "launches in order")]
READ = {
    "64K, one rank alone": "zigzag-8B-64K-w1-r0",
    "64K, first of eight ranks": "zigzag-8B-64K-w8-r0",
    "64K, last of eight": "zigzag-8B-64K-w8-r7",
    "128K, last of eight": "zigzag-8B-128K-w8-r7",
}
SIZES = {4096: "4K", 8192: "8K", 16384: "16K", 32768: "32K", 65536: "64K", 131072: "128K"}


def of_eight(row: Row) -> bool:
    return bool(row["kind"] == "zigzag" and row["world"] == 8 and row["tokens"] >= 8192 and row["stride"] == 0)


def span(way: str, name: str) -> str:
    told = sorted(row["tflops"] for row in grouped(way, name, "graph", of_eight))
    return f"{told[0]:.0f} to {told[-1]:.0f}"


def over_two(shape: str) -> str:
    return f"{one(shape, 'fa3', 'forward', 'graph')['speedups']['fa3: launches in order'][0]:.2f}"


def fastest() -> Iterator[str]:
    for name, way in (("forward", "fa3"), ("forward + backward", "triton")):
        times = grouped_times(ROWS, name)
        yield f"{sum(min(own, key=own.__getitem__) == way for own in times.values())} of {len(times)}"


def least_and_most() -> Iterator[str]:
    times = grouped_times(ROWS, "forward + backward").values()
    ratios = [own["triton"] / own["fa3"] - 1 for own in times if {"fa3", "triton"} <= own.keys()]
    yield f"up to {-100 * min(ratios):.0f} % less than `fa3`"
    yield f"up to {100 * max(ratios):.0f} % more"


def speeds() -> Iterator[str]:
    yield f"forward at {span('fa3', 'forward')} TFLOP/s"
    yield f"`triton` at {span('triton', 'forward')} forward"
    yield f"and {span('triton', 'forward + backward')} with gradients"
    yield f"`torch` at {span('torch', 'forward')}"
    for tokens in ("4K", "16K", "64K"):
        yield " and ".join(over_two(f"zigzag-8B-{tokens}-w8-r{rank}") for rank in (7, 0)) + f" at {tokens}"


def forward_table() -> Iterator[str]:
    for tokens, told in SIZES.items():
        last, first = (one(f"zigzag-8B-{told}-w8-r{rank}", "fa3", "forward", "graph") for rank in (7, 0))
        over = [
            last["speedups"][f"fa3: {way}"] for way in ("launches in order", "a stream each", "dense, as many FLOPs")
        ]
        cells = [f"{each[0]:.2f}" for each in (*over, first["speedups"]["fa3: launches in order"])]
        assert last["tokens"] == tokens
        yield f"| {told} | {last['tflops']:.0f} | {' | '.join(cells)} |"


def step(shape: str, way: str) -> str:
    found = [r for r in ROWS if (r["shape"], r["pass"], r["way"]) == (shape, "context parallel", f"{way}: grouped")]
    if not found:
        return ""
    told = found[0]["speedups"][f"{way}: the origin's algorithm"]
    return f"{told[0]:.2f} {interval(told, found[0], 2)}"


def step_table() -> Iterator[str]:
    for told in list(SIZES.values())[1:]:
        cells = [
            step(f"zigzag-{of}", way) for of in (f"8B-{told}-w8-r7", f"8B-{told}-w8-r0") for way in ("fa3", "triton")
        ]
        cells += [step(f"zigzag-70B-{told}-w8-r7", way) for way in ("fa3", "triton")]
        yield f"| {told} | {' | '.join(cells)} |"


def small(tokens: int) -> Callable[[Row], bool]:
    return lambda row: row["world"] == 8 and row["stride"] == 0 and row["model"] == "8B" and row["tokens"] == tokens


def long_steps(row: Row) -> bool:
    return bool(row["stride"] == 0 and row["tokens"] >= 32768)


def one_head(row: Row) -> bool:
    return bool(row["stride"] == 1)


def claims() -> Iterator[str]:
    for way in ("fa3", "torch"):
        own = [one(f"zigzag-8B-{told}-w8-r7", way, "forward", "graph")["speedups"] for told in ("8K", "64K")]
        yield " and ".join(f"{each['PyTorch: context parallel'][0]:.2f}" for each in own) + f" with `{way}`"
    for told, tokens in (("4K", 4096), ("8K", 8192)):
        yield f"{percent('fa3', 'forward', 'graph', 'launches in order', small(tokens))} at {told}"
    of = "a call for each chunk"
    for way in ("fa3", "triton"):
        yield f"{percent(way, 'context parallel', 'eager', of, long_steps)} with `{way}`"
    for way in ("fa3", "triton"):
        yield f"{percent(way, 'forward', 'graph', 'launches in order', one_head)} with `{way}`"


def of_heads(count: int) -> Callable[[Row], bool]:
    """Many groups of so many query heads."""
    return lambda row: row["kind"] == "many groups" and row["shape"].endswith(f"-h{count}")


def gains() -> Iterator[str]:
    for heads, words in ((8, "{} times as fast as a"), (32, "it is {} times")):
        own = speedups("fa3", "forward", "graph", IN_ORDER, of_heads(heads))
        yield words.format(spread(own, 2))
    many = speedups("fa3", "forward", "graph", DENSE, lambda row: row["kind"] == "many groups")
    assert all(0.98 <= each <= 1.02 for each in many), "as fast as one dense call"
    streams = [percent(way, "forward", "graph", "a stream each", one_head) for way in ("fa3", "triton")]
    yield f"and {' and '.join(streams)} faster than two streams"
    yield f"is {spread(speedups('fa3', 'forward', 'graph', 'flashinfer: paged, one launch'), 2)} times as fast"


def long_sequences() -> Iterator[str]:
    own = all_heads(lambda row: row["tokens"] >= 16384)
    long = {(row["shape"], row["tokens"]): row["speedups"][IN_ORDER] for row in own}
    gain = [100 * (told[0] - 1) for told in long.values()]
    yield f"{spread(gain)} %, 2 % or more in {sum(each >= 2 for each in gain)} of {len(gain)}"
    lows = [told[1] for (_, tokens), told in long.items() if tokens >= 32768]
    yield f"holds no gain as well in {sum(low <= 1 for low in lows)} of {len(lows)}"
    last = [100 * (told[0] - 1) for (name, tokens), told in long.items() if tokens >= 65536 and "-w8-r7" in name]
    yield f"it is {spread(last)} %: keys come from"


def over_the_origin(tokens: int, models: str, *, eight: bool = True) -> str:
    def fits(row: Row) -> bool:
        return (row["tokens"], row["stride"], row["world"] == 8) == (tokens, 0, eight) and row["model"] in models

    return percent("fa3", "context parallel", "eager", "the origin's algorithm", fits)


def whole_steps() -> Iterator[str]:
    told = {model: [over_the_origin(tokens, model) for tokens in (8192, 32768, 65536)] for model in ("8B", "70B")}
    yield "with 8B heads {} at 8K, {} at 32K, {} at 64K".format(*told["8B"])
    yield "with 70B heads {}, {} and {}; of fewer".format(*told["70B"])
    yield f"of fewer ranks less, at 64K {over_the_origin(65536, '8B, 70B', eight=False)}"
    slower = [shape for shape, own in grouped_times(ROWS, "forward + backward").items() if own["triton"] > own["fa3"]]
    assert all(shape.endswith("-s1") for shape in slower)
    yield f"but for {len(slower)} shapes of one key head"


def bytes_table() -> Iterator[str]:
    for name, shape in READ.items():
        own = [COUNTED[shape, way] for way in LAUNCHES]
        told = [own[0]["key_bytes"], own[0]["key_reads"], *(row["read_bytes"] for row in own)]
        yield f"| {name} | {' | '.join(f'{each / 1e6:,.0f}' for each in told)} |"


def bytes_saved() -> Iterator[str]:
    first, last = (
        [COUNTED[READ[f"64K, {rank}"], LAUNCHES[0]][of] / 1e6 for of in ("key_reads", "key_bytes")]
        for rank in ("first of eight ranks", "last of eight")
    )
    yield "the first needs {:.0f} and {:.0f} MB, the last {:.0f} and {:.0f}".format(*first, *last)
    less = {way: [fewer_bytes(shape, way) for shape in READ.values()] for way in ("fa3", "triton")}
    at_64k = [spread(own[:-1]) for own in less.values()]
    yield "{} % less than two with `fa3` at 64K, {} % less with".format(*at_64k)
    yield "at 128K more ({:.0f} and {:.0f} %)".format(*(-own[-1] for own in less.values()))


def fewer_bytes(shape: str, way: str) -> float:
    one_launch, two = (COUNTED[shape, f"{way}: {what}"]["read_bytes"] for what in ("grouped", "launches in order"))
    return float(100 * (1 - one_launch / two))


@pytest.mark.parametrize(
    ("file", "derived"),
    [
        ("README.md", fastest),
        ("README.md", least_and_most),
        ("README.md", speeds),
        ("solutions/README.md", forward_table),
        ("solutions/README.md", step_table),
        ("solutions/README.md", claims),
        ("solutions/README.md", gains),
        ("solutions/README.md", whole_steps),
        ("solutions/README.md", long_sequences),
        ("solutions/README.md", bytes_table),
        ("solutions/README.md", bytes_saved),
    ],
)
def test_a_readme_has_the_numbers_of_the_rows(file: str, derived: Callable[[], Iterator[str]]) -> None:
    assert unsaid(file, derived()) == []


def test_the_pages_are_those_of_the_rows() -> None:
    rows = read(RESULTS / "grouped.ndjson")

    assert (RESULTS / "goals.md").read_text() == page(rows)
    assert (RESULTS / "grouped.md").read_text() == markdown(rows, [shape.name for shape in shapes()])

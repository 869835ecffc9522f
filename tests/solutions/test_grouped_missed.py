"""What missed, and what was tested on a GPU: solutions/README.md as the committed rows and reports have it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

import pytest
from grouped_bench.goals import goals
from grouped_bench.report import PLAN
from grouped_checks import CHECKS
from grouped_numbers import DENSE, IN_ORDER, RESULTS, ROOT, ROWS, all_heads, grouped, speedups, spread, unsaid

README = "solutions/README.md"
STEP = "zigzag, forward + backward, {}, over the origin's algorithm"
SMALL = "8 to 16 groups of at most 1K rows over a launch each"
MET = (
    "the whole step over the origin's algorithm at 8K by `triton`, forward over two launches at 4K to 8K by `fa3` and "
    "`triton`, 16 groups of 4 rows on the same 64K keys over a launch each by `triton` and `torch`"
)
WHICH = [
    f"triton: {STEP.format('8K')}",
    *(f"{way}: forward over two launches, 4K to 8K" for way in ("fa3", "triton")),
    *(f"{way}: 16 groups of 4 rows on the same 64K keys over a launch each" for way in ("triton", "torch")),
]
# What is said of goals that are missed, and which those are, as results/grouped/goals.md names them.
MISSED = {
    "misses it in {0.few} of {0.of} shapes, three": ["fa3: forward over a dense call of as many FLOPs"],
    "in {0.few} of {0.of} shapes, by 3 % at most, `triton` in {1.few} and `torch` in {2.few}.": [
        f"{way}: forward over two launches, 16K and up" for way in ("fa3", "triton", "torch")
    ],
    "misses it in {0.few} of {0.of}, rank 0": ["torch: forward over two launches, 4K to 8K"],
    "missed in {0.few}, {1.few} and {2.few} of {0.of} by": [f"{way}: {SMALL}" for way in ("fa3", "triton", "torch")],
    "`fa3` and `torch` in {0.few} and {1.few} of {0.of} shapes": [
        f"{way}: {STEP.format('8K')}" for way in ("fa3", "torch")
    ],
    "in {0.few}, {1.few} and {2.few} of {0.of}, most": [
        f"{way}: {STEP.format('64K')}" for way in ("fa3", "triton", "torch")
    ],
    "missed in {0.few} of {0.of} and {1.few} of {1.of} shapes, most": [
        "triton: forward",
        "triton: backward, as both passes less the forward one",
    ],
}


class Short(NamedTuple):
    """How many shapes miss a goal, of how many."""

    few: int
    of: int


def missed() -> Iterator[str]:
    short = {}
    for goal in goals():
        found = goal.found(ROWS)
        short[goal.says] = Short(sum(not goal.reached(each.value, goal.must) for each in found), len(found))
    yield f"{sum(not each.few for each in short.values())} of {len(short)} goals are met in every shape: {MET}."
    assert [name for name, each in short.items() if not each.few] == WHICH
    for words, names in MISSED.items():
        yield words.format(*(short[name] for name in names))


def worst() -> Iterator[str]:
    shared = speedups("fa3", "forward", "graph", DENSE, lambda row: row["kind"] == "shared keys")
    yield f"a dense call is {spread([1 / each for each in shared])} times as fast"
    slowest = min(row["speedups"][IN_ORDER][0] for row in all_heads(lambda row: row["tokens"] >= 16384))
    yield f"by {100 * (1 - slowest):.0f} % at most"
    (few,) = speedups("fa3", "forward", "graph", IN_ORDER, lambda row: row["shape"] == "shared-16x4-64K")
    yield f"`fa3` has {few:.2f}"
    torch = speedups("torch", "forward", "graph", "torch: launches in order", lambda row: row["tokens"] in (4096, 8192))
    yield f"down to {min(torch):.2f} times"


def left_to_save() -> Iterator[str]:
    """Of shapes that miss the goal of a whole step, those where not even launches alone would be fast enough."""
    yield f"for it in {out_of_reach('fa3', '8K', 1.5)} of those of `fa3` at 8K"
    yield f"in {out_of_reach('fa3', '64K', 1.05)} at 64K and in {out_of_reach('triton', '64K', 1.05)} of `triton`"


def out_of_reach(way: str, tokens: str, must: float) -> str:
    origin, left = f"{way}: the origin's algorithm", []
    for row in grouped(way, "context parallel", "eager", lambda row: f"-{tokens}-" in row["shape"]):
        if row["speedups"][origin][0] < must:
            launches = timed(row["shape"], "forward + backward", "graph", f"{way}: launches in order")
            left.append(timed(row["shape"], "context parallel", "eager", origin) / launches)
    return f"{sum(each < must for each in left)} of {len(left)}"


def timed(shape: str, name: str, mode: str, way: str) -> float:
    (told,) = (row for row in ROWS if (row["shape"], row["pass"], row["mode"], row["way"]) == (shape, name, mode, way))
    return float(told["median_ms"])


def staying() -> Iterator[str]:
    """Programs that stay over one a tile with the table's tiles, whichever tiles they have."""
    rows = json.loads((RESULTS / "staying.json").read_text())["rows"]
    own = [row for row in rows if row["tiles"] == rows[0]["tiles"]]  # the table's come first
    same = [told[0] for row in own for told in row["times_as_fast_as_one"].values()]
    yield f"{spread(same, 2)} times as fast with the same tiles"
    one = {row["shape"]: row["ms"]["one"][0] for row in own}
    larger = [row for row in rows if row not in own]
    best = max(one[row["shape"]] / row["ms"][way][0] for row in larger for way in ("dealt", "taken"))
    yield f"at best {best:.2f} times"


def planning() -> Iterator[str]:
    for device, words in (("x86_64", "{} ms for one backend and {:.2f} ms"), ("NVIDIA H200", "{} ms and {:.3f} ms")):
        plans = {row["way"]: row["median_ms"] for row in ROWS if row["mode"] == PLAN and row["device"] == device}
        auto = plans.pop("auto: plan")
        yield words.format(spread(list(plans.values()), 2), auto)


def paced() -> Iterator[str]:
    passes = {(row["shape"], row["pass"]) for row in ROWS if "tflops" in row}
    found = {(row["shape"], row["pass"]) for row in ROWS if "matmul_tflops" in row}
    yield f"Beside {len(found)} of {len(passes)} passes a product of matrices was timed"


@pytest.mark.parametrize("derived", [missed, worst, left_to_save, staying, planning, paced])
def test_the_readme_has_the_numbers_of_the_rows(derived: Callable[[], Iterator[str]]) -> None:
    assert unsaid(README, derived()) == []


OTHERWISE = {"failure", "error", "skipped"}


def passed() -> set[tuple[str, str]]:
    """File and name of each test on a GPU that passed in one of the reports."""
    found = set()
    for report in (RESULTS / "tests").glob("*.xml"):
        cases = [case for case in ET.parse(report).iter("testcase") if not OTHERWISE & {part.tag for part in case}]
        found |= {(case.attrib["classname"].rpartition(".")[2], case.attrib["name"]) for case in cases}
    return found


FILES = [*(ROOT / "tests/gpu").glob("test_grouped_*_gpu.py"), ROOT / "tests/gpu/test_zigzag_gpu.py"]


def of_file(file: Path) -> Iterator[str]:
    yield from re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


def test_the_readme_counts_what_passed_on_a_gpu() -> None:
    ranks = [name for _, name in passed() if name.startswith("test_every_rank_gives_attention_on_one_gpu")]
    told = Counter(file for file, name in passed() if name not in ranks or "[1 GPUs" in name)

    assert (
        unsaid(
            README,
            [
                f"{told['test_grouped_attention_gpu']:,} tests of layouts",
                f"{told['test_grouped_stress_gpu']} stress tests",
                f"{told['test_zigzag_gpu']} of zigzag attention",
            ],
        )
        == []
    )
    assert {name.partition("[")[2] for name in ranks} == {
        f"{count} GPUs-{backend}]" for count in (1, 2, 4) for backend in ("torch", "fa3", "triton")
    }


def test_the_readme_names_what_no_report_of_a_gpu_has() -> None:
    written = {name for file in FILES for name in of_file(file)}
    run = {name.partition("[")[0] for _, name in passed()}
    checked = {name.rpartition("-")[2].rstrip("]") for _, name in passed() if name.startswith("test_layouts[")}
    section = " ".join((ROOT / README).read_text().partition("Written since,")[2].split())

    assert {*re.findall(r"`(test_\w+)`", section)} == written - run
    assert {*re.findall(r'"([^"]+)"', section)} == {name for name in CHECKS if "sampled" not in name} - checked

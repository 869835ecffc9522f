"""Which backend "auto" takes, held against the times in results/grouped: an H200, CUDA graphs, no host in them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from grouped_bench.report import read
from grouped_bench.shapes import HEAD_DIM, Shape, shapes
from grouped_layouts import Layout, Subject, planned

from refgrid_solutions.grouped_attention import GroupedAttnPlan, backends
from refgrid_solutions.grouped_attention.predicted import few_tiles

ROOT = Path(__file__).resolve().parents[2]
SHAPES = {shape.name: shape for shape in shapes()}
PASSES = ("forward", "forward + backward")
BOTH = {"fa3", "triton"}  # one of which "auto" is on an H200


def measured() -> dict[str, dict[str, dict[str, float]]]:
    """Of each pass and shape that both were timed in, the time of a grouped call of each backend."""
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in PASSES}
    for row in read(ROOT / "results/grouped/grouped.ndjson"):
        backend, _, way = row["way"].partition(": ")
        if (row["mode"], way) == ("graph", "grouped") and row["pass"] in found:
            found[row["pass"]].setdefault(row["shape"], {})[backend] = row["median_ms"]
    return {which: {name: each for name, each in times.items() if set(each) >= BOTH} for which, times in found.items()}


MEASURED = measured()


def plan_of(shape: Shape) -> GroupedAttnPlan:
    """On a GPU that need not be here."""
    subject = Subject("reference", heads=shape.heads, head_dim=HEAD_DIM)
    here = planned(Layout(list(shape.pieces), shape.total_q, shape.total_k), subject, backend="reference")
    return replace(here, device=torch.device("cuda", 0))


class Held(NamedTuple):
    """Of how many shapes the chosen backend took the least time, and how many times as long as that at worst."""

    shapes: int
    fastest: int
    worst: float


def held(chosen: dict[str, str], times: dict[str, dict[str, float]]) -> Held:
    """The choices of a pass against its times."""
    factors = [each[chosen[name]] / min(each.values()) for name, each in times.items()]
    return Held(len(factors), factors.count(1), max(factors))


@pytest.fixture(autouse=True)
def _an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "refusal", lambda *_: "")


def chosen(names: Iterable[str], number: int) -> dict[str, str]:
    """What "auto" is for each shape without gradients (0), and with them (1)."""
    return {name: backends.choose(plan_of(SHAPES[name]))[number] for name in names}


def auto(number: int) -> Held:
    """The same, held against the times."""
    times = MEASURED[PASSES[number]]
    return held(chosen(times, number), times)


def always(backend: str) -> Held:
    """One backend for every shape with gradients."""
    times = MEASURED[PASSES[1]]
    return held(dict.fromkeys(times, backend), times)


def test_there_are_times_to_hold_it_against() -> None:
    assert all(len(times) > 80 for times in MEASURED.values())


def test_without_gradients_auto_is_the_fastest_of_every_shape() -> None:
    found = auto(0)

    assert (found.fastest, found.worst) == (found.shapes, 1)


def test_with_gradients_auto_is_the_fastest_of_nearly_every_shape_and_never_far_from_it() -> None:
    found = auto(1)

    assert found.fastest >= 0.98 * found.shapes
    assert found.worst <= 1.15


@pytest.mark.parametrize("few", [False, True])
def test_a_rule_that_is_blind_to_tiles_would_not_pass(few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "few_tiles", lambda _: few)

    found = auto(1)

    assert found == always("fa3" if few else "triton")
    assert found.fastest < 0.98 * found.shapes
    assert found.worst > 1.15


def test_deterministic_gradients_of_few_tiles_were_not_timed_so_they_are_no_exception() -> None:
    plan = plan_of(SHAPES["zigzag-8B-8K-w8-r0-s1"])
    host = plan.host.clone()
    host[0] = True

    assert backends.choose(plan) == ("fa3", "fa3")
    assert backends.choose(replace(plan, host=host)) == ("fa3", "triton")


@pytest.mark.parametrize(
    ("tokens", "heads", "few"),
    [(128 * 131, (2, 1), True), (128 * 132, (2, 1), False), (128 * 65, (2, 2), True), (128 * 66, (2, 2), False)],
)
def test_tiles_of_keys_are_counted_over_heads_and_against_processors(
    tokens: int, heads: tuple[int, int], few: bool
) -> None:
    assert few_tiles(planned(Layout([], 1, tokens), Subject("auto", heads=heads))) is few


@pytest.mark.parametrize(("rows", "few"), [(128 * 65 + 1, False), (128 * 65, True)])
def test_tiles_of_rows_are_counted_over_heads_and_against_twice_as_many(rows: int, few: bool) -> None:
    assert few_tiles(planned(Layout([], rows, 1), Subject("auto", heads=(4, 1)))) is few


def test_the_readme_tells_these_numbers() -> None:
    without, found, one = auto(0), auto(1), always("triton")
    told = (
        f"it took the least time of all {without.shapes} shapes forward and of {found.fastest} of {found.shapes} "
        f"forward and backward, at most {found.worst - 1:.0%} more in the rest"
    ).replace("%", " %")
    beside = f"`triton` alone: of {one.fastest}, up to {one.worst - 1:.0%} more".replace("%", " %")
    readme = " ".join((ROOT / "README.md").read_text().split())

    assert told in readme
    assert beside in readme

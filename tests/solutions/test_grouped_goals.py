"""The page of goals says of each shape whether it is there; plans have rows, few rounds no interval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from grouped_bench import planning
from grouped_bench.__main__ import main
from grouped_bench.goals import Found, Goal, goals, page, verdict
from grouped_bench.report import PLAN, Row, latest_plans, markdown, read
from grouped_bench.timing import Times

CPU = torch.device("cpu")
ORIGIN = "fa3: zigzag, forward + backward, 64K, over the origin's algorithm"


def timed(shape: str, over: dict[str, tuple[float, float, float]], **changes: Any) -> Row:
    row: Row = {"shape": shape, "kind": "zigzag", "model": "8B", "tokens": 65536, "world": 8, "rank": 7, "stride": 0}
    row |= {"pass": "forward", "mode": "graph", "way": "fa3: grouped", "rounds": 11, "device": "a GPU", "torch": "2"}
    times = {"median_ms": 1.0, "lowest_ms": 0.5, "highest_ms": 2.0, "tflops": 600.0}
    return {**row, **times, "speedups": over, **changes}


def step(shape: str, speedup: float, **changes: Any) -> Row:
    over = {"fa3: the origin's algorithm": (speedup, 0.9, 1.2)}
    return timed(shape, over, **{"pass": "context parallel", "mode": "eager", **changes})


def line(rows: list[Row], says: str) -> str:
    (found,) = [told for told in page(rows).splitlines() if told.startswith(f"| {says} |")]
    return found


def test_a_goal_is_met_where_every_shape_meets_it() -> None:
    assert line([step("one", 1.05), step("other", 1.2)], ORIGIN) == (
        f"| {ORIGIN} | 1.05x | 2 | 2 | one | 1.050x [0.900, 1.200] | met | 1.10x | missed in 1 of 2 |"
    )


def test_a_shape_that_misses_is_the_worst_and_is_named_with_the_others() -> None:
    rows = [step("good", 1.2), step("bad", 1.04, stride=1), step("worse", 1.01, rounds=3)]

    assert line(rows, ORIGIN).startswith(
        f"| {ORIGIN} | 1.05x | 3 | 1 | worse | 1.010x (0.900 to 1.200) | missed in 2 of 3"
    )
    missed = (
        f"- {ORIGIN}, 1 of them one key head at a time: worse 1.010x (0.900 to 1.200), bad 1.040x [0.900, 1.200].\n"
    )
    assert missed in page(rows)


def test_what_nobody_timed_is_not_met() -> None:
    assert "| not timed | 1.10x | not timed |" in line([step("8K", 9.0, tokens=8192)], ORIGIN)


def test_time_must_stay_below() -> None:
    goal = Goal("plan", 1.0, None, lambda _: [], " ms", most=True)

    assert verdict(goal, [Found("a", 0.99, "", one_head=False)], 1.0) == "met"
    assert (
        verdict(goal, [Found("a", 0.99, "", one_head=False), Found("b", 1.0, "", one_head=False)], 1.0)
        == "missed in 1 of 2"
    )


def test_groups_of_more_rows_or_fewer_groups_have_no_goal() -> None:
    over = {"fa3: launches in order": (1.5, 1.4, 1.6)}
    names = ["groups-8x1024-h8", "groups-16x2048-h8", "groups-4x512-h8", "shared-16x1-64K"]
    (goal,) = [each for each in goals() if each.says.startswith("fa3: 8 to 16 groups")]

    assert [each.what for each in goal.found([timed(name, over, kind="any") for name in names])] == names[:1]


def test_backward_alone_is_both_passes_less_the_forward_one() -> None:
    both = timed("z", {}, **{"pass": "forward + backward", "way": "triton: grouped", "median_ms": 4.0, "tflops": 450.0})
    forward = timed("z", {}, way="triton: grouped", tflops=600.0)
    (goal,) = [each for each in goals() if each.says.startswith("triton: backward")]

    assert goal.found([both, forward]) == [Found("z", 400.0, "", one_head=False)]
    assert goal.found([both]) == []


def test_few_rounds_are_not_resampled() -> None:
    one, other = Times((1.0,) * 6), Times((1.0, 2.0, 3.0, 4.0, 5.0, 6.0))

    assert one.speedup(other) == (3.5, 1.0, 6.0)
    over = {"fa3: launches in order": (3.5, 1.0, 6.0)}
    assert "| 3.50 (1.00 to 6.00) |" in markdown([timed("z", over, rounds=6)])
    assert "| 3.50 [1.00, 6.00] |" in markdown([timed("z", over, rounds=7)])
    assert "of fewer than 7 rounds, too few to resample, the lowest and the highest" in markdown([])


def test_tables_say_beside_what_product_a_pass_was_timed() -> None:
    over = {"fa3: launches in order": (1.0, 1.0, 1.0)}
    rows = [timed("a", over), timed("b", over, matmul_tflops=701.4)]

    told = markdown(rows)
    assert "Beside 1 of 2 passes a product of matrices ran at 701 to 701 TFLOP/s." in told
    assert "| shape | ms | TFLOP/s | product of matrices | over launches in order |\n|---|---|---|---|---|\n" in told
    assert "| a | 1.000 (0.500 to 2.000) | 600 |  | 1.00" in told
    assert "| b | 1.000 (0.500 to 2.000) | 600 | 701 | 1.00" in told
    assert "No product of matrices was timed beside any of the 1 passes" in markdown(rows[:1])


def test_ways_that_most_passes_lack_are_counted() -> None:
    rows = [timed("a", {}), timed("b", {}), timed("c", {}, world=0)]
    rows += [timed("a", {}, way="fa3: a stream each"), timed("a", {}, way="PyTorch: context parallel")]

    told = markdown(rows)
    assert "| forward | fa3: a stream each | 1 | 3 |\n" in told
    assert "| forward | PyTorch: context parallel | 1 | 2 |\n" in told


@pytest.fixture
def _two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "_ROUNDS", 2)
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("_two_rounds")
def test_plans_have_rows_with_their_host_once(tmp_path: Path) -> None:
    arguments = ["--plan", "--device", "cpu", "--backends", "fa3,torch", "--output", str(tmp_path)]
    for _ in range(2):
        assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0

    rows = read(tmp_path / "grouped.ndjson")
    assert [(row["way"], row["mode"]) for row in rows] == [(f"{name}: plan", PLAN) for name in ("auto", "fa3", "torch")]
    assert all(row["host"].endswith("cores") and row["load"] >= 0 and row["torch"] == torch.__version__ for row in rows)
    assert "## Plans of 64 groups, by the host\n\n| plan | host |" in (tmp_path / "grouped.md").read_text()
    assert "| plan of 64 groups | under 1 ms | 3 |" in (tmp_path / "goals.md").read_text()


@pytest.mark.usefixtures("_two_rounds")
def test_another_host_or_torch_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = planning.planned([], ["torch"], CPU, "x86")

    assert planning.planned(first, ["torch"], CPU, "x86") == []
    assert len(planning.planned([{**row, "torch": "1"} for row in first], ["torch"], CPU, "x86")) == 2
    monkeypatch.setattr(planning, "_host", lambda: "another")
    assert len(planning.planned(first, ["torch"], CPU, "x86")) == 2


@pytest.mark.usefixtures("_two_rounds")
def test_a_host_that_was_busy_is_timed_again_once_it_is_not_and_the_last_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.setattr("os.getloadavg", lambda: (10.2, 0.0, 0.0))
    busy = planning.planned([], ["torch"], CPU, "x86")
    assert planning.planned(busy, ["torch"], CPU, "x86") == []  # it still is

    monkeypatch.setattr("os.getloadavg", lambda: (1.0, 0.0, 0.0))
    quiet = planning.planned(busy, ["torch"], CPU, "x86")
    assert [row["load"] for row in quiet] == [1.0, 1.0]
    assert latest_plans([*busy, *quiet]) == quiet
    assert planning.planned([*busy, *quiet], ["torch"], CPU, "x86") == []

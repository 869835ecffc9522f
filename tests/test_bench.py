"""The benchmark of the instrument ends 1 where a median is beyond its bound, and says which."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from refgrid.commands import bench
from refgrid.commands.bench import Figure, main

MIB = 2**20
BESIDES = 64 * MIB  # of what a comparison may take; the process itself takes some MiB beside


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """The command with another comparison of outputs of some bytes each; assert_close takes a second by the clock.

    A comparison takes so many seconds, and `masked` of outputs in which 1 element of 64 is -inf on both sides.
    """
    clock = {"now": 0.0}

    def assert_close(*_: Any, **__: Any) -> None:
        clock["now"] += 1.0

    def command(*, seconds: float = 1.0, masked: float | None = None, held: int = 0) -> Result:
        def compare(_: str, actual: torch.Tensor, expected: torch.Tensor, __: object) -> None:
            torch.ones(held, dtype=torch.uint8)
            lost = [side.view(-1)[:640].isneginf().nonzero().flatten().tolist() for side in (actual, expected)]
            clock["now"] += masked if masked and lost == [list(range(0, 640, 64))] * 2 else seconds

        monkeypatch.setattr(bench, "_COMPARED", BESIDES)
        monkeypatch.setattr(time, "perf_counter", lambda: clock["now"])
        monkeypatch.setattr(torch.testing, "assert_close", assert_close)
        monkeypatch.setattr("refgrid.proving.compare.compare", compare)
        return CliRunner().invoke(main, ["--comparison", "--repeats", "2", f"--output={tmp_path / 'found.json'}"])

    return command


def test_a_comparison_within_its_bounds_ends_0_and_is_told(run: Callable[..., Result], tmp_path: Path) -> None:
    done = run(seconds=3.0, held=BESIDES)

    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "found.json").read_text())
    assert set(told["machine"]) == {"platform", "cores", "python", "torch"}
    ratios = [figure for figure in told["figures"] if figure["what"].startswith("their ratio")]
    assert {(figure["median"], figure["bound"]) for figure in ratios} == {(3.0, 3)}
    memory = [figure["median"] for figure in told["figures"] if figure["what"].startswith("memory")]
    assert len(memory) == 5  # shapes
    assert all(0.9 < median < 1.5 for median in memory)


def test_a_slow_comparison_ends_1(run: Callable[..., Result]) -> None:
    done = run(seconds=3.1)

    assert done.exit_code == 1
    assert f"beyond its bound: their ratio, {BESIDES // 2} on 1 thread is 3.10 but should be at most 3" in done.output


def test_a_comparison_slow_where_elements_are_infinite_ends_1(run: Callable[..., Result]) -> None:
    done = run(masked=3.1)

    assert done.exit_code == 1
    (first, *more) = [line for line in done.output.splitlines() if line.startswith("beyond its bound")]
    what = f"their ratio, {BESIDES // 256} x 128, 1 in 64 -inf on 1 thread"
    assert first == f"beyond its bound: {what} is 3.10 but should be at most 3"
    assert all(", 1 in 64 -inf on " in line for line in more)


def test_a_hungry_comparison_ends_1(run: Callable[..., Result]) -> None:
    done = run(held=2 * BESIDES)

    assert done.exit_code == 1
    assert "beyond its bound: memory of all metrics, parts of one output of 4 x " in done.output
    assert "beyond its bound: their ratio" not in done.output


def test_the_median_counts() -> None:
    assert Figure("what", (1.0, 2.0, 9.0), 2).within
    assert not Figure("what", (1.0, 2.1, 2.2), 2).within
    assert Figure("what", (1e9,)).within

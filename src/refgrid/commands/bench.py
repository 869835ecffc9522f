"""What the instrument itself costs: `python -m refgrid.commands.bench`, printed as medians with their spread.

Collection is measured over whole pytest processes. The cost of a case is the test loop's wall time less what
reference, truth (with the once-a-process start of its library) and comparison took, over one small definition. A
comparison of large outputs is held against `torch.testing.assert_close` on the same tensors, in turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import click
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from refgrid.records.record import read_runs

_BESIDES = ("reference", "source", "truth", "compare", "referee")
_COMPARED = 2**29  # bytes of each of two bfloat16 outputs
_BLOCK = 2**22  # elements that are drawn at once


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Runs of each measurement.")
@click.option("--definition-name", default="rmsnorm_h128", show_default=True, help="Whose cases are timed.")
@click.option("--comparison", is_flag=True, help="Time the comparison of large outputs only.")
def main(repeats: int, definition_name: str, comparison: bool) -> None:
    """Time the collection of every case, the instrument's share of a case, and the comparison of large outputs."""
    table = Table("what", "median", "lowest", "highest", "bound", title="instrument")
    for row in _comparison(repeats):  # first, while nothing else has raised the most that this process has held
        table.add_row(*row)
    if not comparison:
        _add_cases(table, repeats, definition_name)
    Console().print(table)


def _add_cases(table: Table, repeats: int, definition_name: str) -> None:
    collected = [_collection() for _ in range(repeats)]
    table.add_row(f"collect {collected[0][1]} cases, s", *_spread([seconds for seconds, _ in collected]), "5 s")
    costs = [_cost(definition_name) for _ in range(repeats)]
    drawn, plain = [cost for cost, _ in costs], [without for _, without in costs]
    table.add_row("one case besides reference, truth, comparison, ms", *_spread(drawn), "5 ms")
    table.add_row("the same without drawing the inputs, ms", *_spread(plain), "")


def _spread(values: Sequence[float]) -> tuple[str, str, str]:
    return f"{statistics.median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"


def _comparison(repeats: int) -> Generator[tuple[str, ...], None, None]:
    """Rows of time and memory for two outputs of 512 MiB that differ by what a kernel's rounding does."""
    import torch

    from refgrid.proving.compare import compare
    from refgrid.proving.tolerance import Tolerance

    expected = torch.empty(_COMPARED // 2, dtype=torch.bfloat16)
    actual = torch.empty_like(expected)
    generator, draw = torch.Generator().manual_seed(0), torch.empty(_BLOCK)
    for one, other in zip(actual.split(_BLOCK), expected.split(_BLOCK), strict=True):
        other.copy_(draw.normal_(generator=generator))
        one.copy_(draw.mul_(1.001))
    before = psutil.Process().memory_info().rss
    compare("output", actual, expected, Tolerance(8e-3, 1e-2))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10 - before
    for threads in dict.fromkeys((1, torch.get_num_threads())):
        torch.set_num_threads(threads)
        torchs, own = [], []
        for _ in range(repeats):
            torchs.append(_seconds(lambda: torch.testing.assert_close(actual, expected, atol=8e-3, rtol=1e-2)))
            own.append(_seconds(lambda: compare("output", actual, expected, Tolerance(8e-3, 1e-2))))
        where = f"2 x 512 MiB on {threads} thread{'s' if threads > 1 else ''}"
        yield f"assert_close of {where}, s", *_spread(torchs), ""
        yield f"all metrics of {where}, s", *_spread(own), ""
        yield "their ratio", *_spread([mine / other for mine, other in zip(own, torchs, strict=True)]), "3"
    told = f"{peak / _COMPARED:.3f}"
    yield "memory of all metrics, parts of one output", told, told, told, "1.5"


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _collection() -> tuple[float, int]:
    """Seconds of a whole pytest process that collects every case, and how many it found."""
    command = [sys.executable, "-m", "pytest", "tests/references", "--collect-only", "-q", "--test-sizes"]
    started = time.perf_counter()
    done = subprocess.run([*command, "small,medium,large"], capture_output=True, text=True, check=True)
    return time.perf_counter() - started, sum("::" in line for line in done.stdout.splitlines())


def _cost(definition_name: str) -> tuple[float, float]:
    """Milliseconds a case that are the instrument's, with and without drawing inputs."""
    with tempfile.TemporaryDirectory() as folder:
        timer = _LoopTimer()
        options = ["--device", "cpu", "--test-sizes", "small", "--definition-name", definition_name]
        # this module has imported refgrid before pytest could rewrite its asserts, of which it has none to show
        quiet = ["-q", "--no-summary", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        pytest.main(["tests/references", *quiet, *options, "--results", folder], plugins=[timer])
        (run,) = read_runs(Path(folder))
    spent = [outcome.seconds for outcome in run.outcomes.values()]
    besides = sum(seconds.get(name, 0.0) for seconds in spent for name in _BESIDES)
    inputs = sum(seconds.get("inputs", 0.0) for seconds in spent)
    own = timer.seconds - timer.first - besides
    return 1e3 * own / len(spent), 1e3 * (own - inputs) / len(spent)


class _LoopTimer:
    """Wall time of the test loop, and of its first test, which imports torch."""

    seconds = first = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtestloop(self) -> Generator[None, bool, bool]:
        started = time.perf_counter()
        result = yield
        self.seconds = time.perf_counter() - started
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        started = time.perf_counter()
        result = yield
        self.first = self.first or time.perf_counter() - started
        return result


if __name__ == "__main__":
    main()

"""What the instrument itself costs: `python -m refgrid.commands.bench`, medians with their spread; 1 beyond a bound.

Collection is measured over whole pytest processes. The cost of a case is the test loop's wall time less what
reference, truth (with the once-a-process start of its library) and comparison took, over one small definition. A
comparison of large outputs, elements and rows, is held against `torch.testing.assert_close` on the same tensors, in
turns.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
import pytest
from rich.console import Console
from rich.table import Table

from refgrid.records.record import now, read_runs

if TYPE_CHECKING:
    import torch

_BESIDES = ("reference", "source", "truth", "compare", "referee")
_COMPARED = 2**29  # bytes of each of two bfloat16 outputs
_BLOCK = 2**22  # elements that are drawn at once
_MASKED = 64  # one in so many is -inf on both sides, as the lse of a row without keys is, and a masked logit
_ATOL, _RTOL, _ROW_NORM = 8e-3, 1e-2, 4e-3  # every calibrated row of 16 bits bounds rows too


@dataclass(frozen=True)
class Figure:
    """What was measured in some turns, and the most that its median may be."""

    what: str
    values: tuple[float, ...]
    bound: float | None = None

    @property
    def within(self) -> bool:
        """Whether the bound holds, if there is one."""
        return self.bound is None or statistics.median(self.values) <= self.bound

    def cells(self) -> tuple[str, ...]:
        """As a row of the table."""
        spread = statistics.median(self.values), min(self.values), max(self.values)
        return (self.what, *(f"{value:.2f}" for value in spread), "" if self.bound is None else f"{self.bound:g}")


@click.command()
@click.option("--repeats", default=5, show_default=True, help="Runs of each measurement.")
@click.option("--definition-name", default="rmsnorm_h128", show_default=True, help="Whose cases are timed.")
@click.option("--comparison", is_flag=True, help="Time the comparison of large outputs only.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Also write what was measured here.")
def main(repeats: int, definition_name: str, comparison: bool, output: Path | None) -> None:
    """Time the collection of every case, the instrument's share of a case, and the comparison of large outputs.

    Ends 1 when a median is beyond its bound.
    """
    figures = list(_comparison(repeats))
    if not comparison:
        figures += _cases(repeats, definition_name)
    _show(figures)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(_told(figures), indent=1) + "\n", encoding="utf-8")
    beyond = [figure for figure in figures if not figure.within]
    for figure in beyond:
        told = f"is {statistics.median(figure.values):.2f} but should be at most {figure.bound:g}"
        click.echo(f"beyond its bound: {figure.what} {told}", err=True)
    sys.exit(1 if beyond else 0)


def _show(figures: Sequence[Figure]) -> None:
    table = Table("what", "median", "lowest", "highest", "bound", title="instrument")
    for figure in figures:
        table.add_row(*figure.cells())
    Console().print(table)


def _told(figures: Sequence[Figure]) -> dict[str, Any]:
    """The figures and the machine's kind, as data."""
    import torch

    machine = {"platform": f"{platform.system()} {platform.machine()}".lower(), "cores": len(os.sched_getaffinity(0))}
    kind = {**machine, "python": platform.python_version(), "torch": torch.__version__}
    rounded = [{**asdict(figure), "values": [float(f"{value:.4g}") for value in figure.values]} for figure in figures]
    medians = [float(f"{statistics.median(figure.values):.4g}") for figure in figures]
    rows = [{**figure, "median": median} for figure, median in zip(rounded, medians, strict=True)]
    return {"date": now(), "load": os.getloadavg()[0], "machine": kind, "figures": rows}


def _cases(repeats: int, definition_name: str) -> Iterator[Figure]:
    collected = [_collection() for _ in range(repeats)]
    yield Figure(f"collect {collected[0][1]} cases, s", tuple(seconds for seconds, _ in collected), 5)
    drawn, plain = zip(*(_cost(definition_name) for _ in range(repeats)), strict=True)
    yield Figure("one case besides reference, truth, comparison, ms", drawn, 5)
    yield Figure("the same without drawing the inputs, ms", plain)


def _comparison(repeats: int) -> Iterator[Figure]:
    """Time and memory for two outputs of 512 MiB that differ by what a kernel's rounding does, rows of any length.

    Of usual rows also where some elements are -inf on both sides.
    """
    actual, expected = _outputs()
    count = len(expected)
    usual = count // 128, 128
    for shape in ((count,), (4, count // 4), (count // 16, 16), usual):
        yield from _compared(actual.view(shape), expected.view(shape), repeats)
    for side in (actual, expected):
        side[::_MASKED] = -math.inf
    yield from _compared(actual.view(usual), expected.view(usual), repeats, f", 1 in {_MASKED} -inf")


def _outputs() -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    expected = torch.empty(_COMPARED // 2, dtype=torch.bfloat16)
    actual = torch.empty_like(expected)
    generator, draw = torch.Generator().manual_seed(0), torch.empty(_BLOCK)
    for one, other in zip(actual.split(_BLOCK), expected.split(_BLOCK), strict=True):
        drawn = draw[: len(other)].normal_(generator=generator)
        other.copy_(drawn)
        one.copy_(drawn.mul_(1.001))
    return actual, expected


def _compared(actual: torch.Tensor, expected: torch.Tensor, repeats: int, besides: str = "") -> Iterator[Figure]:
    import torch

    from refgrid.proving.compare import compare
    from refgrid.proving.tolerance import Tolerance

    def own() -> object:
        return compare("output", actual, expected, Tolerance(_ATOL, _RTOL, row_norm=_ROW_NORM))

    def torchs() -> object:
        return torch.testing.assert_close(actual, expected, atol=_ATOL, rtol=_RTOL)

    where = " x ".join(map(str, expected.shape)) + besides
    yield Figure(f"memory of all metrics, parts of one output of {where}", (_peak(own) / expected.nbytes,), 1.5)
    threads = torch.get_num_threads()
    for count in dict.fromkeys((1, threads)):
        torch.set_num_threads(count)
        turns = [(_seconds(torchs), _seconds(own)) for _ in range(repeats)]
        on = f"{where} on {count} thread{'s' if count > 1 else ''}"
        yield Figure(f"assert_close of {on}, s", tuple(other for other, _ in turns))
        yield Figure(f"all metrics of {on}, s", tuple(mine for _, mine in turns))
        yield Figure(f"their ratio, {on}", tuple(mine / other for other, mine in turns), 3)


def _peak(call: Callable[[], object]) -> int:
    """The most bytes that this process held at once during a call, beyond what it held before: Linux's own account."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the highest back to what is held now
    before = psutil.Process().memory_info().rss
    call()
    status = Path("/proc/self/status").read_text().splitlines()
    (highest,) = (int(line.split()[1]) * 2**10 for line in status if line.startswith("VmHWM:"))
    return max(0, highest - int(before))


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

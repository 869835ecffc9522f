"""The command `refgrid scaling`: the same cases on 1, 2, 4, ... of the visible GPUs, one number after another.

Strong scaling: the cases stay the same, GPUs and the cores that go with them grow. What is compiled at the first call
would count against whoever runs first: compile ahead, and let one run go before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from refgrid.records.record import Run, Verdict, read_runs, verdict_counts
from refgrid.running.devices import VISIBLE, Device, DeviceError, told_devices, visible_devices


@dataclass(frozen=True)
class Timing:
    """One run. `seconds` is the whole command's wall time, `start` how much of it passed before the cases were known.

    `busy` is the share of the workers' time, after the start, that records give to inputs, reference, truth and
    comparison.
    """

    gpus: int
    workers: int
    cases: int
    seconds: float
    start: float
    busy: float
    verdicts: dict[str, int]

    @property
    def rate(self) -> float:
        """Cases a second of wall time."""
        return self.cases / self.seconds

    def efficiency(self, of: Timing) -> float:
        """How much of the growth in GPUs, against another run, is growth in cases a second."""
        return self.rate / of.rate * of.gpus / self.gpus


def _counts(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text!r} should be numbers of GPUs such as 1,2,4")
    return [int(word) for word in words]


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--gpus", callback=_counts, default="1,2,4", show_default=True, help="Numbers of GPUs, in this order.")
@click.option("--workers-per-gpu", type=click.IntRange(1), default=1, show_default=True, help="Workers on each GPU.")
@click.option("--cores-per-gpu", type=click.IntRange(1), help="Cores that go with each GPU (default: all, always).")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file for the numbers.")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def scaling(
    gpus: list[int],
    workers_per_gpu: int,
    cores_per_gpu: int | None,
    output: Path | None,
    pytest_args: tuple[str, ...],
) -> None:
    """Time the same cases on growing numbers of GPUs; PYTEST_ARGS select them, and nothing is cached.

    Exit 1 when a run had a red case or did not account for all of them: its time means nothing.
    """
    devices = _demanded(max(gpus))
    console, timings = Console(), list[Timing]()
    for count in gpus:
        cores = None if cores_per_gpu is None else cores_per_gpu * count
        timings.append(_timed(count, devices, workers_per_gpu, cores, pytest_args))
        console.print(f"{count} GPU(s): {timings[-1].cases} cases in {timings[-1].seconds:.1f} s", highlight=False)
    console.print(_table(timings))
    if output:
        told = [{**asdict(each), "rate": each.rate, "efficiency": each.efficiency(timings[0])} for each in timings]
        output.write_text(json.dumps({"arguments": list(pytest_args), "runs": told}, indent=1) + "\n", encoding="utf-8")
    if faults := [fault for each in timings if (fault := _fault(each, timings[0]))]:
        console.print("\n".join(faults), style="red", highlight=False)
        sys.exit(1)


def _demanded(count: int) -> Sequence[Device]:
    try:
        devices = visible_devices()
    except DeviceError as error:
        raise click.UsageError(str(error)) from error
    if len(devices) < count:
        raise click.UsageError(f"--gpus asks for {count}, but visible are {told_devices(devices)}")
    return devices


def _timed(count: int, devices: Sequence[Device], workers: int, cores: int | None, asked: Sequence[str]) -> Timing:
    """One run in a pytest of its own, with records of its own."""
    shown = {VISIBLE: ",".join(device.uuid for device in devices[:count])}
    plugins = ["-p", "xdist.plugin", "-p", "refgrid.plugin"]
    crash_safe = ["--dist=load", "--max-worker-restart=10000"]
    own = ["--device=cuda", "--no-cache", "--no-resume", f"--workers-per-gpu={workers}", f"-n{workers * count}"]
    with tempfile.TemporaryDirectory(prefix="refgrid-scaling-") as folder, _only(cores):
        command = [sys.executable, "-m", "pytest", *plugins, *crash_safe, *own, f"--results={folder}", *asked]
        began, started = time.time(), time.perf_counter()
        done = subprocess.run(
            command,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **shown},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        runs = read_runs(Path(folder))
    if len(runs) != 1:
        raise click.ClickException(f"pytest ended {done.returncode} and recorded nothing: {done.stdout[-2000:]}")
    return _timing(runs[0], count, workers * count, seconds, began)


def _timing(run: Run, gpus: int, workers: int, seconds: float, began: float) -> Timing:
    start = min(seconds, max(0.0, datetime.fromisoformat(run.header.started).timestamp() - began))
    spent = sum(sum(outcome.seconds.values()) for outcome in run.outcomes.values())
    verdicts = {verdict.value: number for verdict, number in verdict_counts(run.accounted()).items()}
    busy = spent / (workers * max(seconds - start, 1e-9))
    return Timing(gpus, workers, len(run.header.planned), seconds, start, busy, verdicts)


@contextmanager
def _only(cores: int | None) -> Iterator[None]:
    """Children inherit the cores of this process."""
    if cores is None:
        yield
        return
    before = os.sched_getaffinity(0)
    if cores > len(before):
        raise click.UsageError(f"--cores-per-gpu asks for {cores} cores in all, but there are {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _fault(each: Timing, first: Timing) -> str:
    if red := [name for name in each.verdicts if Verdict(name).colour == "red"]:
        return f"{each.gpus} GPU(s): there are red cases ({', '.join(red)}), so the time means nothing"
    if each.verdicts != first.verdicts:
        return f"{each.gpus} GPU(s): ended in {each.verdicts}, but {first.gpus} in {first.verdicts}: not the same work"
    return ""


def _table(timings: Sequence[Timing]) -> Table:
    table = Table("GPUs", "workers", "cases", "wall, s", "start, s", "cases/s", "efficiency", "workers busy")
    for each in timings:
        told = (f"{each.seconds:.1f}", f"{each.start:.1f}", f"{each.rate:.1f}", f"{each.efficiency(timings[0]):.2f}")
        table.add_row(str(each.gpus), str(each.workers), str(each.cases), *told, f"{100 * each.busy:.0f}%")
    return table

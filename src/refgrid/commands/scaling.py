"""The command `refgrid scaling`: the same cases on 1, 2, 4, ... of the visible GPUs, one number after another.

Strong scaling: the cases stay the same, GPUs and the cores that go with them grow. What is compiled at the first call
would count against whoever runs first: compile ahead, and let one run go before.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from refgrid.records.record import RecordError, read_runs
from refgrid.report.scaling import Timing, TimingError, fault, timing, timing_of_finished
from refgrid.running.devices import VISIBLE, Device, DeviceError, told_devices, visible_devices


def _counts(_: click.Context, __: click.Parameter, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise click.BadParameter(f"{text!r} should be numbers of GPUs such as 1,2,4")
    return [int(word) for word in words]


def _finished(_: click.Context, __: click.Parameter, given: Sequence[str]) -> list[tuple[Path, float | None]]:
    """FOLDER, or FOLDER=SECONDS."""
    found = []
    for text in given:
        told = re.fullmatch(r"(?P<folder>.+?)(=(?P<seconds>\d+(\.\d+)?))?", text)
        if not told or not Path(told["folder"]).is_dir() or float(told["seconds"] or 1) == 0:
            raise click.BadParameter(f"{text!r} should be a folder of records, or FOLDER=SECONDS")
        found.append((Path(told["folder"]), float(told["seconds"]) if told["seconds"] else None))
    return found


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--gpus", callback=_counts, default="1,2,4", show_default=True, help="Numbers of GPUs, in this order.")
@click.option("--workers-per-gpu", type=click.IntRange(1), default=1, show_default=True, help="Workers on each GPU.")
@click.option("--cores-per-gpu", type=click.IntRange(1), help="Cores that go with each GPU (default: all, always).")
@click.option(
    "--from",
    "finished",
    callback=_finished,
    multiple=True,
    metavar="FOLDER[=SECONDS]",
    help="Run nothing, and read the run whose records lie there; how long it took, else from its plan to its last "
    "record. May be repeated.",
)
@click.option("--beside", multiple=True, metavar="TEXT", help="What else ran on the machine; once, or for each run.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="A JSON file for the numbers.")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def scaling(
    gpus: list[int],
    workers_per_gpu: int,
    cores_per_gpu: int | None,
    finished: list[tuple[Path, float | None]],
    beside: tuple[str, ...],
    output: Path | None,
    pytest_args: tuple[str, ...],
) -> None:
    """Time the same cases on growing numbers of GPUs; PYTEST_ARGS select them, and nothing is cached.

    Of runs that have ended, --from says so again from their records.

    Exit 1 when a run had a red case or did not account for all of them: its time means nothing.
    """
    notes = _notes(beside, len(finished or gpus))
    if finished:
        timings = _read(finished, cores_per_gpu, pytest_args)
    else:
        timings = _run(gpus, workers_per_gpu, cores_per_gpu, pytest_args)
    timings = [replace(each, beside=note) for each, note in zip(timings, notes, strict=True)]
    console = Console()
    console.print(_table(timings))
    if output:
        text = json.dumps([each.told(timings[0]) for each in timings], indent=1)
        output.write_text(f"{text}\n", encoding="utf-8")
    if faults := [told for each in timings if (told := fault(each, timings[0]))]:
        console.print("\n".join(faults), style="red", highlight=False)
        sys.exit(1)


def _notes(beside: Sequence[str], runs: int) -> Sequence[str]:
    if len(beside) not in {0, 1, runs}:
        raise click.UsageError(f"--beside is given {len(beside)} times, but should be once, or for each of {runs} runs")
    return beside if len(beside) == runs else [*beside, ""][:1] * runs


def _read(finished: Sequence[tuple[Path, float | None]], cores: int | None, asked: Sequence[str]) -> list[Timing]:
    if asked:
        raise click.UsageError(f"--from runs nothing, so {' '.join(asked)} has no meaning")
    try:
        return [timing_of_finished(folder, seconds, cores) for folder, seconds in finished]
    except (TimingError, RecordError) as error:
        raise click.UsageError(str(error)) from error


def _run(gpus: Sequence[int], workers: int, cores_per_gpu: int | None, asked: Sequence[str]) -> list[Timing]:
    devices, timings = _demanded(max(gpus)), list[Timing]()
    for count in gpus:
        cores = None if cores_per_gpu is None else cores_per_gpu * count
        timings.append(_timed(count, devices, workers, cores, asked))
        told = f"{count} GPU(s): {timings[-1].cases} cases in {timings[-1].seconds:.1f} s"
        Console().print(told, highlight=False)
    return timings


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
    start = min(seconds, max(0.0, datetime.fromisoformat(runs[0].header.started).timestamp() - began))
    return timing(runs[0], count, workers * count, cores or len(os.sched_getaffinity(0)), seconds, start)


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


def _table(timings: Sequence[Timing]) -> Table:
    table = Table("GPUs", "workers", "cases", "wall, s", "start, s", "cases/s", "efficiency", "workers busy")
    for each in timings:
        start = "" if each.start is None else f"{each.start:.1f}"
        told = (f"{each.seconds:.1f}", start, f"{each.rate:.1f}", f"{each.efficiency(timings[0]):.2f}")
        table.add_row(str(each.gpus), str(each.workers), str(each.cases), *told, f"{100 * each.busy:.0f}%")
    return table

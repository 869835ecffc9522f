"""`python -m refgrid.mutants`: plant every fault of the table at every small workload, and demand red."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from refgrid.dataset.case import SIZES, parse_sizes
from refgrid.mutants.kept import keep, read
from refgrid.mutants.report import Report, Run, false_alarms, rows, unsound
from refgrid.mutants.table import MutantError, load_mutants

if TYPE_CHECKING:
    from refgrid.mutants.running import Task, Told

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="GLOB", help="Only mutants whose id fits, 'moe: *'; may be repeated.")
@click.option("--test-sizes", default="small", show_default=True, metavar="|".join(SIZES), help="Comma-separated.")
@click.option("-n", "processes", type=click.IntRange(min=1), default=1, show_default=True, help="How many processes.")
@click.option(
    "--timeout",
    type=click.IntRange(min=1),
    default=600,
    show_default=True,
    help="Seconds after which a fault is a hang.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--dataset", type=_FOLDER, default=".", help="Data set whose mutants/ are planted (default: this folder)."
)
@click.option(
    "--output",
    type=_FOLDER,
    help="Folder whose mutants.md and mutants.json take what was judged, and keep the rest (default: none is written).",
)
def main(
    only: tuple[str, ...],
    test_sizes: str,
    processes: int,
    timeout: int,
    device: str,
    dataset: Path,
    output: Path | None,
) -> None:
    """Plant faults into references and adapters and demand that each turns a case red.

    Ends 1 when a mutant survives, 2 when none could be planted.
    """
    started = time.perf_counter()
    try:
        table = load_mutants(dataset / "mutants")
        if output is not None:
            read(output, table, ())  # to refuse a broken file before the work, not after
        report = _report(dataset.absolute(), only, test_sizes, device, processes=processes, limit=timeout)
    except (MutantError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    console = Console()
    show(report, console)
    if output is not None:
        for file in keep(report, output, table):
            console.print(f"written: {file}", style="dim", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s", style="dim")
    sys.exit(report.exit_code)


def _report(root: Path, only: Sequence[str], test_sizes: str, device: str, *, processes: int, limit: int) -> Report:
    from refgrid.dataset.definition import load_dataset  # with torch, once the options are known to be right
    from refgrid.mutants.baseline import CHECKS
    from refgrid.mutants.running import chosen, demand_device, demand_plantable, self_tests, tasks

    wanted, gpu = parse_sizes(test_sizes), demand_device(device)
    here, elsewhere = chosen(root, only, device)
    data = load_dataset(root)
    demand_plantable(data, [*here, *elsewhere])
    todo = tasks(root, data, here, wanted, device)
    told = _with_progress(todo, processes, limit)
    run = Run(device, wanted, _environment(gpu), false_alarms(told, CHECKS), unsound(told))
    return Report(rows(here, told, self_tests(data, here, limit), run), tuple(elsewhere), CHECKS)


def _with_progress(todo: Sequence[Task], processes: int, limit: int) -> list[tuple[Task, Told]]:
    from refgrid.mutants.running import run

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("workloads", total=len(todo))
        found = []
        for task, told in run(todo, processes, limit):
            progress.update(bar, advance=1, description=f"{task.place.definition} {task.workload}"[:60])
            found.append((task, told))
    return found


def _environment(gpu: str) -> dict[str, str]:
    from importlib.metadata import version

    from refgrid.sources import Sources

    libraries = {name: _version(name) for name in ("torch", *Sources().distributions)}
    told = {"python": platform.python_version(), "refgrid": version("refgrid"), **libraries}
    return {"gpu": gpu, **told} if gpu else told


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def show(report: Report, console: Console) -> None:
    """Families first, then every mutant that is not simply caught, then the sum."""
    table = Table("op_type", "caught", "of", *report.checks, title="faults caught")
    for name, (caught, held, fixed) in report.families.items():
        table.add_row(name, str(caught), str(held), *map(str, fixed))
    console.print(table)
    for row in report.rows:
        if row.fate != "caught":
            style = "red" if row.fate in ("survived", "seen") else "yellow"
            console.print(
                f"{row.fate}: {row.mutant.id} ({row.told or 'nothing ran'}): {row.reason}", style=style, markup=False
            )
    for run in report.runs:
        for check, (red, of) in run.false_alarms.items():
            console.print(
                f"{check}: red for the sound code at {red} of {of} workloads, where it proves nothing", style="dim"
            )
        for line in run.unsound:
            console.print(f"held to nothing, red for the sound code too: {line}", style="yellow", markup=False)
    console.print(report.summary, style={0: "bold green", 1: "bold red", 2: "bold yellow"}[report.exit_code])


if __name__ == "__main__":
    main()

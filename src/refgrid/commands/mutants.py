"""The command `refgrid mutants`: plant every fault of the table at small or larger workloads, and demand red."""

from __future__ import annotations

import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from refgrid.dataset.case import SIZES, parse_sizes

if TYPE_CHECKING:
    from refgrid.mutants.campaign import Campaign
    from refgrid.mutants.report import Report, Run
    from refgrid.mutants.running import Task

_FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--only", multiple=True, metavar="GLOB", help="Only mutants whose id fits, 'moe: *'; may be repeated.")
@click.option(
    "--sizes", "--test-sizes", default="small", show_default=True, metavar="|".join(SIZES), help="Comma-separated."
)
@click.option(
    "--workloads", type=click.IntRange(min=1), help="At most so many of a larger size, the smallest (default: all)."
)
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
    help="Folder whose mutants.md and mutants.json take what is judged; what they hold and nothing has changed of is "
    "not planted again (default: none is written).",
)
@click.option("--again", is_flag=True, help="Plant also what --output holds already.")
@click.option(
    "--restate", is_flag=True, help="Plant nothing: write what --output holds anew, as of today's table; needs no GPU."
)
def mutants(
    only: tuple[str, ...],
    sizes: str,
    workloads: int | None,
    processes: int,
    timeout: int,
    device: str,
    dataset: Path,
    output: Path | None,
    *,
    again: bool,
    restate: bool,
) -> None:
    """Plant faults into references and adapters and demand that each turns a case red.

    Ends 1 when a mutant survives, 2 when none could be planted. What was judged before it was ended is kept.
    """
    from refgrid.mutants.campaign import Asked, Campaign  # with torch, once the options are known to be right
    from refgrid.mutants.running import demand_device
    from refgrid.mutants.table import MutantError

    started, console = time.perf_counter(), Console()
    try:
        if restate and output is None:
            raise MutantError("--restate: of what? --output names no folder")
        environment = {} if restate else _environment(demand_device(device))
        asked = Asked(
            dataset.absolute(), only, parse_sizes(sizes), device, output, environment, again=again, most=workloads
        )
        campaign = Campaign(asked)
        report = campaign.restate() if restate else _with_progress(campaign, processes, timeout)
    except (MutantError, ValueError) as error:
        raise click.UsageError(str(error)) from error
    show(report, console)
    if output is not None:
        console.print(f"written: {output / 'mutants.md'} and mutants.json", style="dim", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s", style="dim")
    sys.exit(report.exit_code)


def _with_progress(campaign: Campaign, processes: int, limit: int) -> Report:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("workloads", total=len(campaign.todo))

        def tell(task: Task) -> None:
            progress.update(bar, advance=1, description=f"{task.place.definition} {task.workload}"[:60])

        return campaign.run(processes, limit, tell)


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
    """Families first, then every mutant that is not simply caught, then the sums."""
    for column in report.columns:
        table = Table("op_type", "caught", "of", *report.checks, title=f"faults caught, {column.name}")
        for name, (caught, held, fixed) in column.families.items():
            table.add_row(name, str(caught), str(held), *map(str, fixed))
        console.print(table)
    failed = report.failed
    for row in (row for row in report.rows if row.fate != "caught"):
        told = f"{row.fate}, {' '.join(row.column)}: {row.mutant.id} ({row.told or 'nothing ran'}): {row.reason}"
        console.print(told, style="red" if row in failed else "yellow", markup=False)
    for run in report.runs:
        _show_sound(run, console)
    for line in report.summary:
        console.print(line, style={0: "bold green", 1: "bold red", 2: "bold yellow"}[report.exit_code], markup=False)


def _show_sound(run: Run, console: Console) -> None:
    """Where the sound code is red."""
    for check, (red, of) in run.false_alarms.items() if run.documents else ():
        told = f"{check}: red for the sound code at {red} of {of} workloads, where it proves nothing"
        console.print(told, style="dim")
    for line in run.unsound:
        console.print(f"held to nothing, red for the sound code too: {line}", style="yellow", markup=False)

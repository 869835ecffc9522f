"""The commands `refgrid ci plan` and `refgrid ci merge`: what a workflow does before and after its jobs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn, TextIO

import click

from refgrid.commands.campaign import names_option, print_matrix
from refgrid.environments.ci import PlanError, merge, overlays, plan_jobs, planned_devices, to_matrix
from refgrid.environments.declared import EnvironmentsError, chosen, load_environments

_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(dir_okay=False, path_type=Path)
_table = click.option("--table", type=_FILE, default="ci/environments.toml", help="The table of environments.")


@click.group()
def ci() -> None:
    """Turn sessions into jobs of a workflow, and the records of its jobs into one matrix."""


@ci.command()
@_table
@names_option
@click.option("--github-output", type=_FILE, help="File that takes the outputs `plan` and `overlays` of a step.")
@click.argument("listed", type=click.File())
def plan(table: Path, names: tuple[str, ...], github_output: Path | None, listed: TextIO) -> None:
    """Print one job an environment, as JSON, from LISTED, the output of `nox --list --json` (- for standard input)."""
    try:
        declared = load_environments(table)
        specs = {spec.name: spec for spec in chosen(names or declared, declared)}
        cannot = [name for name, spec in specs.items() if (table.parent / "locks" / spec.unresolvable).exists()]
        jobs = plan_jobs(listed.read(), specs, cannot)
    except (EnvironmentsError, PlanError) as error:
        _fail(str(error))
    for name in cannot:
        click.echo(f"no job for {name}: it cannot be resolved any more", err=True)
    click.echo(to_matrix(jobs))
    if github_output:
        _add(github_output, f"plan={to_matrix(jobs)}\noverlays={overlays(jobs)}\n")


@ci.command("merge")
@click.option("--plan", "planned", required=True, help="What `refgrid ci plan` printed.")
@click.option("--artifacts", type=_FOLDER, required=True, help="Folder with a folder for each downloaded artifact.")
@click.option("--into", type=_FOLDER, default="results/local", help="Folder that takes the records and the matrix.")
@click.option("--summary", type=_FILE, help="File to which the matrix is added as Markdown.")
@click.pass_context
def merge_records(ctx: click.Context, /, planned: str, artifacts: Path, into: Path, summary: Path | None) -> None:
    """Merge the records of all jobs, print the matrix, and exit 1 when it is red or a job has not accounted for all."""
    try:
        faults = merge(planned_devices(planned), artifacts, into)
    except PlanError as error:
        _fail(str(error))
    for fault in faults:
        click.echo(f"error: {fault}", err=True)
    if summary:
        _add(summary, "".join(f"- ✗ {fault}\n" for fault in faults))
    status = print_matrix(ctx, results=into, output=into)
    if summary:
        _add(summary, "\n" + (into / "matrix.md").read_text(encoding="utf-8"))
    sys.exit(1 if faults else status)


def _add(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as summary:
        summary.write(text)


def _fail(reason: str) -> NoReturn:
    raise click.UsageError(reason)

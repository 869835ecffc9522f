"""The commands `refgrid here` and `refgrid run`: what this machine can run, and running it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from refgrid.commands.duration import duration
from refgrid.dataset.definition import DefinitionError, load_dataset
from refgrid.environments.campaign import Campaign, definitions_matching, runnable
from refgrid.environments.declared import EnvironmentsError
from refgrid.environments.machine import Readiness, look_around, readiness
from refgrid.sources import Sources

_FOLDER = click.Path(file_okay=False, path_type=Path)
_table = click.option(
    "--table", type=click.Path(path_type=Path), default="ci/environments.toml", help="The declared environments."
)
_results = click.option("--results", type=_FOLDER, default="results/local", help="Folder of this machine's records.")


def _parts(_: click.Context, __: click.Parameter, given: Sequence[str]) -> tuple[str, ...]:
    """Comma-separated, repeated, or both."""
    return tuple(part.strip() for text in given for part in text.split(",") if part.strip())


names_option = click.option(
    "--environments",
    "names",
    multiple=True,
    callback=_parts,
    metavar="A,B",
    help="Only these, on the CPU where there is no GPU; cu128: all of it.",
)


@click.command()
@_table
@_results
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def here(table: Path, results: Path, *, as_json: bool) -> None:
    """Say which environments this machine can run, why not the others, and when each ran last."""
    shown = _readiness(table, results)
    if as_json:
        click.echo(json.dumps([_plain(each) for each in shown], indent=1))
    else:
        _print(shown)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@_table
@_results
@click.option("--only", multiple=True, callback=_parts, metavar="GLOB", help="An op, an op_type or a definition.")
@names_option
@click.option("--budget", callback=duration, metavar="20m", help="For all together; what has not begun is not-run.")
@click.option("--nox", default="nox", metavar="PROGRAM", help="nox, or a Python that has it.")
@click.argument("pytest_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run(ctx: click.Context, /, table: Path, results: Path, only: tuple[str, ...], **asked: Any) -> None:
    """Run what this machine can, then print the matrix and exit by it.

    Each environment is a `nox -s tests-<environment>` of its own; PYTEST_OPTIONS go there.
    """
    try:
        ready = runnable(asked["names"], _readiness(table, results))
    except EnvironmentsError as error:
        raise click.BadParameter(str(error), param_hint="--environments") from error
    options = [*(f"--definition-name={name}" for name in _definitions(only)), *asked["pytest_options"]]
    campaign = Campaign(_command(asked["nox"]), options, results, asked["budget"])
    lost = campaign.run(ready, lambda line: click.echo(f"refgrid > {line}"))
    status = print_matrix(ctx)
    for line in lost:
        click.echo(f"error: {line}", err=True)
    sys.exit(1 if lost else status)


def print_matrix(ctx: click.Context, **options: Any) -> int:
    """The command `refgrid matrix`; returns its exit status instead of exiting by it."""
    from refgrid.cli import matrix

    try:
        ctx.invoke(matrix, **options)
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _readiness(table: Path, results: Path) -> list[Readiness]:
    try:
        return readiness(table, results, look_around())
    except EnvironmentsError as error:
        raise click.UsageError(str(error)) from error


def _definitions(only: Sequence[str]) -> list[str]:
    """Names for pytest; a run of everything needs none and so notices definitions that are broken."""
    if not only:
        return []
    try:
        return definitions_matching(only, load_dataset(Path()), Sources().ops)
    except (DefinitionError, ValueError) as error:
        raise click.BadParameter(str(error), param_hint="--only") from error


def _command(nox: str) -> list[str]:
    return [nox, "-m", "nox"] if Path(nox).name.startswith("python") else [nox]


def _plain(each: Readiness) -> dict[str, Any]:
    return {
        "name": each.spec.name,
        "session": each.session,
        "kind": each.spec.kind,
        "here": not each.obstacle,
        "obstacle": each.obstacle,
        "recorded": each.recorded,
    }


def _print(shown: Sequence[Readiness]) -> None:
    table = Table("environment", "here", "ran last", "why not")
    for each in shown:
        table.add_row(each.spec.name, "no" if each.obstacle else "yes", each.recorded or "never", each.obstacle)
    Console().print(table)

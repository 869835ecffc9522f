"""The commands of `refgrid` about environments: their table, their locks, and one that could not be installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

import click

from refgrid.environments.declared import EnvironmentsError, EnvironmentTable, chosen, load_table
from refgrid.records.record import Verdict

TABLE = Path("ci/environments.toml")
_table = click.option("--table", type=click.Path(path_type=Path), default=TABLE, help="The table of environments.")


@click.command()
@_table
def check_environments(table: Path) -> None:
    """Hold the table of environments and their locks against each other; exit 1 when one is stale. Needs no network."""
    from refgrid.environments.locks import lock_faults

    try:
        faults = lock_faults(table, table.parent.parent / "pyproject.toml")
    except EnvironmentsError as error:
        _fail(str(error))
    for fault in faults:
        click.echo(fault)
    sys.exit(1 if faults else 0)


@click.command()
@_table
@click.argument("names", nargs=-1)
def lock(table: Path, names: tuple[str, ...]) -> None:
    """Write the locks of all environments, or of those named; a CUDA such as cu128 names all of its environments.

    What cannot be resolved any more gets a file with the resolver's words instead, and is no failure of the command.
    """
    from refgrid.environments.locking import LockError, write_lock

    declared = _load(table)
    try:
        for spec in chosen(names or declared.by_name, declared.by_name):
            file = write_lock(spec, declared, table.parent.parent, table.parent / "locks")
            click.echo(f"written: {file}{_told(file, spec.unresolvable)}")
    except (EnvironmentsError, LockError) as error:
        _fail(str(error))


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--environment", required=True, metavar="NAME", help="Column of the matrix.")
@click.option("--verdict", type=click.Choice(["install-fail", "unresolvable"]), required=True, help="Of every case.")
@click.option("--reason-file", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def record_failure(environment: str, verdict: str, reason_file: Path, pytest_args: tuple[str, ...]) -> None:
    """Record that an environment cannot be used: each case that pytest would owe ends in the verdict, none is run.

    Needs neither torch nor any library. What follows goes to pytest and says which cases these are.
    """
    from refgrid.environments.failed import record

    sys.exit(record(environment, Verdict(verdict), reason_file.absolute(), pytest_args))


def _load(table: Path) -> EnvironmentTable:
    try:
        return load_table(table)
    except EnvironmentsError as error:
        _fail(str(error))


def _told(file: Path, unresolvable: str) -> str:
    return "; it cannot be resolved any more" if file.name == unresolvable else ""


def _fail(reason: str) -> NoReturn:
    raise click.UsageError(reason)

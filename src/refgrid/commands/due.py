"""The commands `refgrid due` and `refgrid explain`: what a run would have to run, and why."""

from __future__ import annotations

import itertools
import sys
from difflib import get_close_matches
from pathlib import Path

import click
import pytest

from refgrid.records.digest import without_collection

_PYTEST_OPTIONS = {"ignore_unknown_options": True, "help_option_names": ["--help"]}


@click.command(context_settings=_PYTEST_OPTIONS)
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
@without_collection()
def due(pytest_args: tuple[str, ...]) -> None:
    """Say how many cases pytest would have to run with these arguments; exit 1 when there is one.

    When none is due, pytest need not be started: the record of the run is written here.
    """
    from refgrid.caching.due import CannotTell
    from refgrid.caching.due import due as look
    from refgrid.records.record import RecordError

    try:
        found = look(pytest_args, Path.cwd())
        if not found.open:
            file = found.write()
            click.echo(f"0 of {len(found.planned)} cases are due; written: {file}")
            click.echo("all are unchanged since their last outcome (--no-cache runs them)")
            return
    except CannotTell as reason:
        click.echo(f"due: {reason}")
        sys.exit(1)
    except (pytest.UsageError, RecordError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"{len(found.open)} of {len(found.planned)} cases are due, such as {found.open[0]}")
    sys.exit(1)


@click.command(context_settings=_PYTEST_OPTIONS)
@click.argument("case_id")
@click.argument("pytest_args", nargs=-1, type=click.UNPROCESSED)
def explain(case_id: str, pytest_args: tuple[str, ...]) -> None:
    """Say what the key of a case is made of, whether a run with these arguments would run it, and why.

    If it failed last, its report follows.
    """
    from refgrid.caching.due import CannotTell
    from refgrid.caching.due import due as look
    from refgrid.caching.explain import failure

    try:
        found = look(pytest_args, Path.cwd())
    except (CannotTell, pytest.UsageError) as error:
        raise click.UsageError(str(error)) from error
    if case_id not in found.planned:
        near = ", ".join(get_close_matches(case_id, found.planned)) or "none"
        told = f"{case_id!r} is none of the {len(found.planned)} cases that this run would plan; near it: {near}"
        raise click.UsageError(told)
    why = found.settled.explained({case_id: found.planned[case_id]})
    for line in itertools.chain(why, failure(case_id, found.settled.records)):
        click.echo(line)

"""The commands `refgrid run-soak` and `refgrid soak`: every case over fresh seeds, and how many were called wrong."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import pytest

from refgrid.commands.duration import duration
from refgrid.environments.campaign import start_and_wait
from refgrid.environments.declared import with_sessions
from refgrid.records.digest import read_digested, without_collection
from refgrid.records.record import RecordError, Run, read_runs
from refgrid.report.soak import Soak, markdown, soaks, to_dict
from refgrid.running.grid import SOAKS

_FOLDER = click.Path(file_okay=False, path_type=Path)
# Test items of one pytest process: it collects so many in ten seconds, and every worker does.
_ITEMS = 30_000


_results = click.option("--results", type=_FOLDER, default=SOAKS, show_default=True, help="Folder of their records.")


@click.command()
@_results
@click.option("--output", type=_FOLDER, default=None, help="Folder of the reports (default: that of the records).")
@without_collection()
def soak(results: Path, output: Path | None) -> None:
    """Print what the soaks add up to; exit 1 when a case was red, 2 when none was judged."""
    try:
        found = soaks(read_digested(results, results / ".digests"), with_sessions(Path()))
    except RecordError as error:
        raise click.UsageError(str(error)) from error
    folder = output or results
    folder.mkdir(parents=True, exist_ok=True)
    for each in found:
        click.echo(markdown(each))
        click.echo(f"written: {_write(each, folder)}")
    if not any(each.judged for each in found):
        click.echo(f"{results}: holds no soak that has judged a case", err=True)
        sys.exit(2)
    sys.exit(1 if any(each.reds for each in found) else 0)


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": ["--help"]})
@click.option("--seeds", type=click.IntRange(1), default=100, show_default=True, help="How many.")
@click.option("--seed", type=click.IntRange(0), help="The first (default: the one after the last in the records).")
@click.option("--budget", callback=duration, metavar="30m", help="When it is spent, no more cases begin.")
@_results
@click.argument("pytest_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def run_soak(
    ctx: click.Context, seeds: int, seed: int | None, budget: int | None, results: Path, pytest_options: tuple[str, ...]
) -> None:
    """Run every case over fresh seeds, then print the report and exit by it.

    A few seeds at a time, each time in a pytest of its own with PYTEST_OPTIONS, so that all cases have had as many when
    time is spent. What an earlier soak ran is not run again: it counts, as long as nothing has changed.
    """
    first = _next_seed(results) if seed is None else seed
    ends = None if budget is None else time.monotonic() + budget
    told = [sys.executable, "-m", "pytest", *pytest_options, f"--results={results}"]
    for start, count in _rounds(first, seeds, results):
        left = None if ends is None else int(ends - time.monotonic())
        if left is not None and left <= 0:
            click.echo(f"refgrid > the budget was spent before seed {start}")
            break
        given = [] if left is None else [f"--budget={left}s"]
        status = start_and_wait([*told, f"--seed={start}", f"--seeds={count}", *given], outside=False)
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise click.ClickException(f"pytest ended with {status} at seed {start}: the soak ends here")
    ctx.invoke(soak, results=results)


def _rounds(first: int, seeds: int, results: Path) -> Iterator[tuple[int, int]]:
    """First seed and number of seeds of each pytest: one alone, then as many as one process can collect."""
    count, start = 1, first
    while start < first + seeds:
        yield start, count
        start += count
        count = min(max(1, _ITEMS // _planned(results, start - 1)), first + seeds - start)


def _planned(results: Path, seed: int) -> int:
    """How many cases the newest run had of this seed."""
    return max(1, sum(case.seed == seed for case in _soaks(results)[-1].header.planned))


def _next_seed(results: Path) -> int:
    """Seed 0 is that of ordinary runs."""
    return 1 + max((case.seed for run in _soaks(results) for case in run.header.planned), default=0)


def _soaks(results: Path) -> Sequence[Run]:
    try:
        return [run for run in read_runs(results) if run.header.soak] if results.is_dir() else []
    except RecordError as error:
        raise click.ClickException(str(error)) from error


def _write(found: Soak, folder: Path) -> str:
    slug = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in found.environment.title.lower())
    files = {folder / f"{slug}.md": markdown(found), folder / f"{slug}.json": json.dumps(to_dict(found), indent=1)}
    for file, text in files.items():
        file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    return " and ".join(str(file) for file in files)

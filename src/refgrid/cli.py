"""The `refgrid` command: plan, render, add-reference-tests and matrix; all others are in `refgrid.commands`."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.table import Table

from refgrid.commands.audit import audit, overlay, wheelhouse
from refgrid.commands.calibrate import calibrate
from refgrid.commands.campaign import here, run
from refgrid.commands.ci import ci
from refgrid.commands.due import due, explain
from refgrid.commands.environments import check_environments, lock, record_failure
from refgrid.commands.keep import keep
from refgrid.commands.mutants import mutants
from refgrid.commands.scaling import scaling
from refgrid.commands.soak import run_soak, soak
from refgrid.commands.warm import warm
from refgrid.dataset.case import SIZES, Selection, Size, parse_sizes, plan
from refgrid.dataset.definition import DataSet, Definition, DefinitionError, load_dataset
from refgrid.records.digest import without_collection
from refgrid.sources import Sources

_FOLDER = click.Path(file_okay=False, path_type=Path)
_dataset = click.option("--dataset", type=_FOLDER, default=".", help="Data set to use (default: this folder).")
_op_type = click.option("--op-type", multiple=True, metavar="T", help="Only this op_type; may be repeated.")
_name = click.option("--definition-name", multiple=True, metavar="N", help="Only this definition; may be repeated.")


def _sizes_of(_: click.Context, __: click.Parameter, text: str) -> tuple[Size, ...]:
    """Sizes, comma-separated, as the pytest option of the same name takes them."""
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


_SIZES_META = "|".join(SIZES)
_sizes = click.option(
    "--test-sizes", callback=_sizes_of, default="", metavar=_SIZES_META, help="Only these, comma-separated."
)


class _Commands(click.Group):
    """A group whose help says in whole what each command is for, where click cuts that after some fifty letters."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _purpose(self.commands[name])) for name in self.list_commands(ctx)])


def _purpose(command: click.Command) -> str:
    return " ".join((command.help or "").partition("\n\n")[0].split())


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="refgrid")
def main() -> None:
    """Which reference implementations of LLM kernels are right, against which ground truth, and where."""


@main.command("plan")
@_dataset
@_op_type
@_name
@_sizes
@click.option("--json", "as_json", is_flag=True, help="Every case, one JSON object a line.")
def show_plan(
    dataset: Path,
    op_type: tuple[str, ...],
    definition_name: tuple[str, ...],
    test_sizes: tuple[Size, ...],
    as_json: bool,
) -> None:
    """Count (or list) the cases that a run would owe; needs no torch and no GPU."""
    data, sources = _load(dataset), Sources()
    selection = Selection(op_type, definition_name, test_sizes or SIZES)
    try:
        cases = plan(data, {op: sources.serving(op) for op in sources.ops}, selection)
    except ValueError as error:
        _fail(str(error))
    if as_json:
        for case in cases:
            click.echo(json.dumps({"id": case.id, **asdict(case)}))
        return
    _plan_table(Counter((case.op, case.source or case.check, case.size) for case in cases))
    _report_broken(data)


@main.command()
@_dataset
@click.option("--package", default="refgrid_references", help="Package that holds the references and their table.")
@click.option("--check", is_flag=True, help="Write nothing; exit 1 when a file is stale.")
def render(dataset: Path, package: str, check: bool) -> None:
    """Write definitions/<op_type>/<name>.json from the references and their table of sizes."""
    from refgrid.dataset.render import RenderError, stale
    from refgrid.dataset.render import render as write

    try:
        if not check:
            click.echo(f"{len(write(package, dataset))} definitions written below {dataset / 'definitions'}")
            return
        late = stale(package, dataset)
    except RenderError as error:
        _fail(str(error))
    for line in late:
        click.echo(line)
    sys.exit(1 if late else 0)


@main.command()
@_dataset
@click.option("--definition-name", metavar="N", help="One definition.")
@click.option("--op-type", metavar="T", help="All definitions of one op_type.")
@click.option("--all", "everything", is_flag=True, help="All definitions.")
@click.option("--output", type=_FOLDER, default="tests/references", help="Folder of the test files.")
@click.option("--force", is_flag=True, help="Write the class anew where one exists.")
@click.option("--test-sizes", callback=_sizes_of, default="", metavar=_SIZES_META, help="Sizes of the written classes.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="atol = rtol of the written classes.")
@click.option("--reason", "tolerance_reason", default="", metavar="TEXT", help="Why --tolerance is that loose.")
def add_reference_tests(
    dataset: Path,
    definition_name: str | None,
    op_type: str | None,
    everything: bool,
    output: Path,
    **options: Any,
) -> None:
    """Write a test class for each definition that has none; run twice, it changes nothing."""
    from refgrid.dataset.generate import Request, add_reference_tests

    if sum(map(bool, (definition_name, op_type, everything))) != 1:
        _fail("give exactly one of --definition-name N, --op-type T and --all")
    data, sources = _load(dataset), Sources()
    selection = Selection((op_type,) if op_type else (), (definition_name,) if definition_name else ())
    try:
        coverage = add_reference_tests(data, sources.ops, Request(selection, output, **options))
    except (ValueError, SyntaxError) as error:
        _fail(str(error))
    _coverage_table(coverage)
    _report_broken(data)


@main.command()
@_dataset
@click.option("--results", type=_FOLDER, default="results", help="Folder of the records, read with its subfolders.")
@click.option("--output", type=_FOLDER, default="results/local", help="Folder of matrix.md and matrix.json.")
@click.option("--definitions", "by_definition", is_flag=True, help="Rows are definitions, not ops.")
@click.option("--environments", type=click.Path(path_type=Path), default="ci/environments.toml", help="The table.")
@without_collection()
def matrix(dataset: Path, results: Path, output: Path, environments: Path, *, by_definition: bool) -> None:
    """Print the compatibility matrix of all records; exit 1 when a cell is red, 2 when nothing was proven."""
    from refgrid.dataset.reference import text_hash
    from refgrid.records.record import RecordError
    from refgrid.report.kept_columns import read_columns
    from refgrid.report.matrix import assemble, write_files
    from refgrid.report.terminal import print_matrix

    published = _published(dataset)
    today = {name: text_hash(definition.reference) for name, definition in published.items()}
    op_types = {name: definition.op_type for name, definition in published.items()}
    try:
        columns = read_columns(results, kept := output / ".digests", today)
        built = assemble(columns, _declared(environments), op_types)
        soaked = _soaked(results / "soak", published)
    except (RecordError, ValueError) as error:
        _fail(str(error))
    if not built.columns:
        _fail(f"{results} holds no records and {environments} names no environment: give --results, or run cases")
    print_matrix(built, Console(), kept, by_definition=by_definition)
    for line in soaked:
        click.echo(line)
    try:
        for file in write_files(built, output):
            click.echo(f"written: {file}")
    except OSError as error:
        _fail(f"{output}: the matrix cannot be written: {error.strerror or error}")
    sys.exit(built.exit_code)


main.add_command(audit)
main.add_command(keep)
main.add_command(scaling)
main.add_command(calibrate)
main.add_command(overlay)
main.add_command(wheelhouse)
main.add_command(check_environments)
main.add_command(lock)
main.add_command(record_failure)
main.add_command(ci)
main.add_command(due)
main.add_command(explain)
main.add_command(here)
main.add_command(mutants)
main.add_command(run)
main.add_command(run_soak)
main.add_command(soak)
main.add_command(warm)


def _load(folder: Path) -> DataSet:
    try:
        return load_dataset(folder)
    except DefinitionError as error:
        _fail(str(error))


def _published(dataset: Path) -> Mapping[str, Definition]:
    """What records are evidence about; a reference's text tells evidence from history."""
    if not (dataset / "definitions").is_dir():
        click.echo(f"{dataset} holds no definitions: records are taken as they are, whatever reference they measured")
        return {}
    return _load(dataset).definitions


def _soaked(folder: Path, published: Mapping[str, Definition]) -> list[str]:
    """How old the kept reports of soaks are; what is of today is looked up where there are some."""
    from refgrid.caching.today import today
    from refgrid.report.soak_age import ages

    return [age.told for age in ages(folder, today(published, Sources()))] if folder.is_dir() else []


def _declared(file: Path) -> dict[str, str]:
    from refgrid.environments.machine import why_not_recorded

    return why_not_recorded(file) if file.exists() else {}


def _plan_table(counts: Counter[tuple[str, str, str]]) -> None:
    table = Table("op", "held against", *SIZES, title=f"{counts.total()} cases planned")
    for op, against in dict.fromkeys((op, against) for op, against, _ in counts):
        table.add_row(op, against, *(str(counts[op, against, size]) for size in SIZES))
    Console().print(table)


def _coverage_table(coverage: Any) -> None:
    table = Table("op_type", "definitions", "written", "tested before", "without a test", title="coverage")
    for op_type in coverage.op_types:
        table.add_row(op_type, *map(str, coverage.row(op_type)))
    Console().print(table)


def _report_broken(data: DataSet) -> None:
    for error in data.broken:
        click.echo(f"error: {error}", err=True)
    if data.broken:
        sys.exit(1)


def _fail(reason: str) -> NoReturn:
    raise click.UsageError(reason)

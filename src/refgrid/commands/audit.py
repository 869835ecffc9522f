"""The commands of `refgrid` about what is installed: the audit, a wheelhouse, and laying one over an interpreter."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import click

from refgrid.dataset.memory import parse_bytes
from refgrid.environments.audit import EXIT_CODE, AuditFinding, audit_named
from refgrid.environments.declared import EnvironmentsError, EnvironmentSpec, declared_as, load_environments
from refgrid.environments.imports import Imports
from refgrid.environments.measured import gpus, measure

TABLE = Path("ci/environments.toml")
_FOLDER = click.Path(file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_table = click.option("--table", type=click.Path(path_type=Path), default=TABLE, help="The table of environments.")


def _bytes(_: click.Context, __: click.Parameter, text: str) -> int:
    try:
        return int(parse_bytes(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@_table
@click.option("--environment", "name", required=True, metavar="NAME", help="What this interpreter should be.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Where cases would run (default: cuda if it can).")
@click.option("--results", type=_FOLDER, default="results/local", help="Where what imports came to is kept for runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def audit(table: Path, name: str, device: str | None, results: Path, *, as_json: bool) -> None:
    """Hold this interpreter and machine against a declared environment; exit 3 if they are not that.

    Run it with the environment's own interpreter. It imports what is pinned, each in a process of its own, and needs no
    GPU: a library that does says so.
    """
    environment = measure(_declared(table, name).name, device or ("cuda" if gpus() else "cpu"), ())
    found = audit_named(table, environment, Imports(results / ".digests", anew=True))
    click.echo(json.dumps([asdict(each) for each in found], indent=1) if as_json else _told(name, found))
    sys.exit(EXIT_CODE if any(each.severity == "error" for each in found) else 0)


@click.command()
@_table
@click.argument("names", nargs=-1, required=True)
@click.option(
    "--have", type=_FILE, help="What the machine has: pip list --format json, as a file (default: the table)."
)
@click.option("--parts", callback=_bytes, default="60MiB", help="Most bytes of a part (default: 60MiB).")
@click.option("--output", type=_FOLDER, default="wheelhouse", help="Folder of the parts (default: wheelhouse).")
def wheelhouse(table: Path, names: tuple[str, ...], have: Path | None, parts: int, output: Path) -> None:
    """Collect exactly the wheels that a machine without an index lacks for these environments, in parts.

    Torch is never among them, nor what the table says the machine has.
    """
    from refgrid.overlays.wheelhouse import WheelhouseError, build
    from refgrid.overlays.wheels import Source, read_have

    root, specs = table.parent.parent.resolve(), [_declared(table, name) for name in names]
    try:
        there = read_have(have) if have else {}
        with TemporaryDirectory() as scratch:
            source = Source(root, Path(scratch), click.echo)
            build([source.gather(spec, there) for spec in specs], output, parts, click.echo)
    except (WheelhouseError, OSError) as error:
        _fail(str(error))
    click.echo(f"there: python3 {output.name}/overlay.py lay --environment {names[0]} --target site")


@click.command()
@click.option("--wheelhouse", "folder", type=_FOLDER, default="wheelhouse", help="Folder of the parts.")
@click.option("--environment", metavar="NAME", help="Which one, where several were packed.")
@click.option("--target", type=_FOLDER, required=True, help="Folder of the wheels, replaced as a whole.")
def overlay(folder: Path, environment: str | None, target: Path) -> None:
    """Lay a wheelhouse over this interpreter without touching it; exit 3 if it is not whole or not for this machine.

    The same as overlay.py in the wheelhouse, which needs nothing but Python.
    """
    from refgrid.overlays.overlay import main

    named = ["--environment", environment] if environment else []
    sys.exit(main(["lay", "--wheelhouse", str(folder), *named, "--target", str(target)]))


def _declared(table: Path, name: str) -> EnvironmentSpec:
    try:
        return declared_as(name, load_environments(table))
    except EnvironmentsError as error:
        _fail(str(error))


def _told(name: str, found: list[AuditFinding]) -> str:
    return "\n".join(map(str, found)) or f"{name}: everything is as asked for"


def _fail(reason: str) -> NoReturn:
    raise click.UsageError(reason)

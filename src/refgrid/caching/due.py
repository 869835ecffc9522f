"""What a run would have to run, told without starting pytest: where nothing is due, its record is written here.

The options are pytest's own. What only pytest can tell, such as what `-k` leaves over, is told to be due.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from refgrid.caching.settled import Decision, Settled, told_tolerance
from refgrid.contract import METHODS, ReferenceContract
from refgrid.environments.audit import audit_named
from refgrid.environments.declared import EnvironmentsError
from refgrid.environments.imports import Imports
from refgrid.records.ledger import Ledger
from refgrid.records.record import Header, now
from refgrid.running.fresh import demand_rendered
from refgrid.running.grid import Grid
from refgrid.running.options import add_options
from refgrid.running.recorder import demand_declared, file_name

TABLE = Path("ci", "environments.toml")
# Of pytest and xdist, what changes nothing about which cases a run owes.
_WITH_VALUE = ("-n", "--numprocesses", "--dist", "--max-worker-restart", "-p", "--tb", "--color", "--maxfail")
_ALONE = ("-q", "-v", "-x", "--no-header", "--no-summary", "-qq", "-s")


class CannotTell(ValueError):
    """Only pytest itself can tell what is due: the reason."""


@dataclass(frozen=True)
class Due:
    """The cases of a run with their tolerances, and which of them need not run."""

    planned: dict[str, str]
    decision: Decision
    settled: Settled
    grid: Grid

    @property
    def open(self) -> list[str]:
        """What has to run."""
        return [name for name in self.planned if name not in self.decision.settled]

    def write(self) -> Path:
        """The record of the run that need not be started; it takes the place of the last such record.

        Raises RecordError when the folder cannot take it, CannotTell when the environment is not what it should be.
        """
        environment, parts = self.settled.environment, self.settled.keys.run_parts
        planned = tuple(self.grid.cases[name] for name in self.planned)
        header = Header(uuid.uuid4().hex[:12], now(), version("refgrid"), environment, planned, self._findings(), parts)
        unfinished = self.grid.results / f".settled-{os.getpid()}"
        ledger = Ledger(unfinished, header)
        for outcome in self.settled.outcomes_of(self.decision):
            ledger.close_case(outcome)
        ledger.finish("")
        return unfinished.replace(self.grid.results / f"{file_name(header, 'settled')}.jsonl")

    def _findings(self) -> tuple[str, ...]:
        imports = Imports(self.grid.results / ".digests")
        found = audit_named(TABLE.absolute(), self.settled.environment, imports)
        if any(each.severity == "error" for each in found):
            raise CannotTell("the audit of the environment has errors")
        return tuple(each.text for each in found)


def due(arguments: Sequence[str], folder: Path) -> Due:
    """What pytest, started in a folder with these arguments, would have to run.

    Raises CannotTell, and UsageError for an option with an unknown value, such as an environment of no declared name.
    """
    config = Asked(folder, [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *arguments])
    demand_declared(folder / TABLE, config.getoption("--environment"))
    grid = Grid(cast(pytest.Config, config))
    demand_rendered(grid.root)
    planned = {name: tolerance for file in config.files for name, tolerance in _owed(file, grid, config)}
    if not planned:
        raise CannotTell("no case is planned")
    settled = Settled(cast(pytest.Config, config), grid)
    ordered = {name: planned[name] for name in sorted(planned, key=grid.order.__getitem__)}
    try:
        return Due(ordered, settled.offer.decide(ordered), settled, grid)
    except EnvironmentsError as error:
        raise CannotTell(str(error)) from error


class Asked:
    """As much of pytest's configuration as tells which cases a run owes."""

    def __init__(self, folder: Path, arguments: Sequence[str]) -> None:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        add_options(cast(pytest.Parser, _Parser(parser)))
        for option in _WITH_VALUE:
            parser.add_argument(option, action="append", dest="_ignored")
        for option in _ALONE:
            parser.add_argument(option, action="count", dest=f"_ignored{option}")
        parser.add_argument("paths", nargs="*", type=Path)
        found, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise CannotTell(f"{' '.join(unknown)}: what that leaves over is not known before pytest runs")
        self._options = vars(found) | {"resume": False}
        self.rootpath = folder
        self.option = SimpleNamespace(collectonly=False)

    def getoption(self, name: str, default: Any = None) -> Any:
        """By its name on the command line."""
        return self._options.get(name.lstrip("-").replace("-", "_"), default)

    @property
    def files(self) -> list[Path]:
        """The test files that are named, or below the folders that are."""
        paths = [self.rootpath / path for path in self._options["paths"] or ["tests/references"]]
        for path in paths:
            if not path.exists():
                raise CannotTell(f"{path.relative_to(self.rootpath)} is no file and no folder")
        return [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("test_*.py")))]


class _Parser:
    """pytest's options are argparse's."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self.addoption = parser.add_argument

    def getgroup(self, *_: str) -> _Parser:
        return self


def _owed(file: Path, grid: Grid, config: Asked) -> Iterator[tuple[str, str]]:
    """The cases of each class in a test file, with their tolerances."""
    for found in runpy.run_path(str(file)).values():
        if isinstance(found, type) and issubclass(found, ReferenceContract) and found is not ReferenceContract:
            asked = config.getoption("--tolerance")
            tolerance = told_tolerance(found.tolerance if asked is None else asked)
            yield from ((case.id, tolerance) for method in METHODS for case in grid.cases_for(found, method, file))

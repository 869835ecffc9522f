"""Cases that a run need not run: those whose outcome stands already, and those of a run that was left and goes on.

The controller finds them before a worker starts and tells all workers alike; each leaves them out of what it collected,
and says which of them it had selected, since only a worker knows what `-k` and the like left over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import pytest

from refgrid.caching.evidence import Bounds, Evidence, record_files, standing
from refgrid.caching.explain import explained
from refgrid.caching.key import TABLE, Keys, Machine
from refgrid.caching.left import Left, left_run, told_run
from refgrid.caching.room import sure_room
from refgrid.caching.searched import Searched
from refgrid.environments.measured import Environment, measure
from refgrid.records.record import Outcome, Verdict

if TYPE_CHECKING:
    from refgrid.contract import ReferenceContract
    from refgrid.running.grid import Grid

_INPUT = "refgrid_settled"  # in xdist's workerinput: the file of the offer


@dataclass(frozen=True)
class Offer:
    """What the controller knows before anything is collected: by case id the tolerances under which it is settled.

    `planned` and `done` are of a run to go on with, if there is one; `done` gives each case's tolerance, where known.
    """

    settled: Mapping[str, list[str]] = field(default_factory=dict)
    planned: list[str] | None = None
    done: Mapping[str, str] = field(default_factory=dict)

    def decide(self, selected: Mapping[str, str]) -> Decision:
        """What of the selected cases, given with their tolerances, is left out."""
        why_not = "" if self.planned is None else self._another_run(selected)
        goes_on = self.planned is not None and not why_not
        done = dict(self.done) if goes_on else {}
        settled = {
            name: tolerance
            for name, tolerance in selected.items()
            if name not in done and tolerance in self.settled.get(name, ())
        }
        return Decision(settled, list(done), goes_on, why_not, dict(selected))

    def _another_run(self, selected: Mapping[str, str]) -> str:
        """How the selected cases differ from those of the run that was left."""
        planned = set(self.planned or ())
        if planned != set(selected):
            return f"it planned {len(planned)} cases, and this run's {len(selected)} are not the same"
        for name, tolerance in self.done.items():
            if tolerance and tolerance != selected[name]:
                return f"{name}: changed since: tolerance {tolerance} -> {selected[name]}"
        return ""


@dataclass(frozen=True)
class Decision:
    """Which of the `selected` cases are not run: settled ones, and those that the run that goes on has done.

    Cases are given with their tolerances.
    """

    settled: Mapping[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)
    goes_on: bool = False
    why_not: str = ""
    selected: Mapping[str, str] = field(default_factory=dict)

    @property
    def left_out(self) -> set[str]:
        """All of them."""
        return {*self.settled, *self.done}


class Settled:
    """The plugin: in the controller it makes the offer, where cases are collected it leaves the settled ones out."""

    def __init__(self, config: pytest.Config, grid: Grid) -> None:
        self._config, self._grid = config, grid
        self._input: dict[str, Any] = getattr(config, "workerinput", {})
        self._folder: TemporaryDirectory[str] | None = None
        self._decision: Decision | None = None
        self._left = Left()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker, and one that replaces it later, the same."""
        if self._folder is None:
            self._folder = TemporaryDirectory(prefix="refgrid-settled-")
            _write(Path(self._folder.name, "offer.json"), self.offer)
        node.workerinput[_INPUT] = self._folder.name

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """After `-k` and the like: what is settled does not run."""
        from refgrid.plugin import case_of

        cases = {case.id: item for item in items if (case := case_of(item))}
        if not cases or self._config.option.collectonly:
            return
        told = self._told if self._input else self.offer
        self._decision = told.decide({name: tolerance_asked(item) for name, item in cases.items()})
        left_out = [cases[name] for name in cases if name in self._decision.left_out]
        gone = {id(item) for item in left_out}
        items[:] = [item for item in items if id(item) not in gone]
        self._config.hook.pytest_deselected(items=left_out)
        if self._input:
            _write(Path(self._input[_INPUT], "decision.json"), self._decision)

    def pytest_unconfigure(self) -> None:
        """The workers are gone, and nobody else writes into the run that went on."""
        if self._folder:
            self._folder.cleanup()
        self._left.release("")

    def decision(self) -> Decision:
        """What was left out, here or, alike, in each worker."""
        if self._decision is None and self._folder and (file := Path(self._folder.name, "decision.json")).is_file():
            self._decision = Decision(**json.loads(file.read_text(encoding="utf-8")))
        return self._decision or Decision()

    def left(self) -> Left:
        """The run that goes on, with the lock on its file; without one, why there is none."""
        decision = self.decision()
        if self._left.run and not decision.goes_on:
            self._left = self._left.release(f"{told_run(self._left.run)}: {decision.why_not}")
        return self._left

    def outcomes(self) -> Iterable[Outcome]:
        """What is recorded of the settled cases at once."""
        return self.outcomes_of(self.decision())

    def outcomes_of(self, decision: Decision) -> Iterator[Outcome]:
        """The outcomes that take those of other runs."""
        for name, tolerance in decision.settled.items():
            case = self._grid.cases[name]
            yield self._standing[name][tolerance].outcome(case, self.keys.key(case, tolerance))

    def told(self) -> Iterable[str]:
        """For the summary: which cases were not run, and why a run that was left does not go on."""
        decision, left = self.decision(), self.left()
        if left.run:
            yield f"went on with {told_run(left.run)}, which had {len(decision.done)} of {len(decision.selected)} cases"
        if left.why_not:
            yield f"a new run, since the one that was left cannot go on: {left.why_not}"
        if decision.settled:
            unchanged = "unchanged since their last outcome (--no-cache runs them)"
            yield f"{len(decision.settled)} of {len(decision.selected)} cases were not run: {unchanged}"

    def explained(self, planned: Mapping[str, str]) -> Iterable[str]:
        """Why each of these cases, given with their tolerances, is run or not."""
        found = {name: kept[tol] for name, tol in planned.items() if tol in (kept := self._standing.get(name, {}))}
        return explained(self._grid.cases, planned, found, self.keys, self.records)

    def keyed(self, outcome: Outcome) -> Outcome:
        """The outcome with its key and the key's parts; without a key where something was edited while the run went on.

        The process that ran the case says with which tolerance and which reference.
        """
        tolerance = outcome.hashes.get("tolerance", self._asked)
        parts = self.keys.parts(outcome.case, tolerance)
        told = {**parts, "key": self.keys.key(outcome.case, tolerance), **outcome.hashes}
        if told.get("reference") != parts.get("reference") or self.keys.edited(outcome.case):
            del told["key"]
        return replace(outcome, hashes=told)

    @cached_property
    def environment(self) -> Environment:
        """As measured, once a run."""
        return measure(self._config.getoption("--environment"), self._grid.device, self._grid.sources.distributions)

    @cached_property
    def keys(self) -> Keys:
        """The keys of all cases here."""
        lock = self._config.rootpath / "ci" / "locks" / f"{self.environment.name}.txt"
        machine = Machine(self.environment, lock, self._config.getoption("--memory"))
        return Keys(self._grid.dataset, self._grid.sources, self._grid.expected, machine)

    @cached_property
    def records(self) -> list[Path]:
        """Where evidence is searched: the committed records and those of this machine."""
        return record_files((self._config.rootpath / "results", self._grid.results))

    @property
    def _asked(self) -> str:
        return told_tolerance(self._config.getoption("--tolerance"))

    @cached_property
    def offer(self) -> Offer:
        """What is known before anything is collected.

        In a project without a data set nothing is settled; what is wrong with one is said by whoever needs it. A soak
        runs all that it plans, every time.
        """
        if not (self._grid.root / "definitions").is_dir() or self._config.option.collectonly or self._grid.is_soak:
            return Offer()
        try:
            return self._made_offer()
        except pytest.UsageError:
            return Offer()

    def _made_offer(self) -> Offer:
        cases, option = self._grid.cases, self._config.getoption
        cache = not option("--no-cache")
        if option("--resume"):
            self._left = left_run(self._grid.results, self.environment, self.keys, cases, cache=cache)
        settled = {name: list(found) for name, found in self._standing.items()} if cache else {}
        if self._left.run is None:
            return Offer(settled)
        return Offer(settled, [case.id for case in self._left.run.header.planned], self._left.done)

    @cached_property
    def _standing(self) -> Mapping[str, Mapping[str, Evidence]]:
        sizes, memory = self._config.getoption("--test-sizes"), self._config.getoption("--memory")
        room = sure_room(self._grid.device, memory, self._config.getoption("--workers-per-gpu"))
        cases = [case for case in self._grid.cases.values() if not sizes or case.size in sizes]
        searched = Searched(self._grid.results / ".digests")
        return standing(self.records, self.keys, cases, self._asked, Bounds(memory, room), searched)

    @cached_property
    def _told(self) -> Offer:
        """What the controller wrote for this worker."""
        return Offer(**json.loads(Path(self._input[_INPUT], "offer.json").read_text(encoding="utf-8")))


def tolerance_asked(item: pytest.Item) -> str:
    """What a case is held to: the option, else the bound of its class, else the table."""
    asked = item.config.getoption("--tolerance")
    contract = cast("type[ReferenceContract]", cast("pytest.Function", item).cls)  # the items of cases are methods
    return told_tolerance(contract.tolerance if asked is None else asked)


def told_tolerance(bound: float | None) -> str:
    """A tolerance as keys have it."""
    return TABLE if bound is None else repr(float(bound))


def is_green(verdicts: Iterable[str]) -> bool:
    """Whether none of them is red."""
    return all(Verdict(verdict).colour != "red" for verdict in verdicts)


def _write(file: Path, told: Offer | Decision) -> None:
    """Whole or not at all: several workers write the same."""
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    unfinished.write_text(json.dumps(asdict(told)), encoding="utf-8")
    unfinished.replace(file)

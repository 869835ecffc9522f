"""What one pytest process knows about the data set: planned cases and, where cases run, the prover."""

from __future__ import annotations

import gc
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest

from refgrid.contract import METHODS, ReferenceContract, method_of
from refgrid.dataset.case import SIZES, Case, Selection, plan
from refgrid.dataset.definition import DataSet, DefinitionError, load_dataset
from refgrid.dataset.generate import definitions_with_tests
from refgrid.proving.expected import ExpectedError, ExpectedFailures, load_expected
from refgrid.running.controller import chosen_device
from refgrid.running.devices import is_fake
from refgrid.running.units import spread
from refgrid.running.worker import share_cores
from refgrid.sources import Sources

if TYPE_CHECKING:
    from refgrid.proving.proof import Prover

SOAKS = Path("soak")  # folder of their records
_DEFAULT_SIZES = ("small", "medium")


class Grid:
    """What one pytest process knows about the data set: planned cases and, in a worker, the prover."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config

    @cached_property
    def sources(self) -> Sources:
        """The ground-truth sources that are installed."""
        return Sources()

    @cached_property
    def dataset(self) -> DataSet:
        """The data set under test. Raises UsageError when there is none."""
        try:
            return load_dataset(self.root)
        except DefinitionError as error:
            raise pytest.UsageError(str(error)) from error

    @property
    def root(self) -> Path:
        """The data set's folder."""
        return cast(Path, self._config.getoption("--dataset") or self._config.rootpath)

    @cached_property
    def cases(self) -> dict[str, Case]:
        """Every case that the options select, by id; raises UsageError naming the legal values."""
        option = self._config.getoption
        op_types, names = tuple(option("--op-type")), tuple(option("--definition-name"))
        selection = Selection(op_types, names, SIZES, self.seeds, option("--checks"))
        serving = {op: self.sources.serving(op) for op in self.sources.ops}
        _demand_near(names, [*self.dataset.definitions, *(error.name for error in self.dataset.broken)])
        try:
            return {case.id: case for case in plan(self.dataset, serving, selection)}
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error

    @cached_property
    def by_definition(self) -> dict[tuple[str, str], list[Case]]:
        """Cases by definition and contract method."""
        grouped = defaultdict(list)
        for case in self.cases.values():
            grouped[case.definition, method_of(case)].append(case)
        return grouped

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of each case: cases of one workload stand together and share its inputs."""
        cases = sorted(self.cases.values(), key=spread) if self.is_soak else self.cases.values()
        return {case.id: place for place, case in enumerate(cases)}

    @cached_property
    def expected(self) -> ExpectedFailures:
        """The known failures of this environment; raises UsageError for an entry that is not true any more."""
        option = self._config.getoption
        try:
            file = self.root / "ci" / "expected_failures.toml"
            found = load_expected(file, option("--environment"), self.device)
            if not any(map(option, ("--op-type", "--definition-name", "--checks"))):
                found.check({case.name for case in self.cases.values()})
        except ExpectedError as error:
            raise pytest.UsageError(str(error)) from error
        return found

    @cached_property
    def leases(self) -> bool:
        """Whether a process needs the lease of a GPU before it runs a case."""
        return chosen_device(self._config) == "cuda"

    @cached_property
    def device(self) -> str:
        """Where cases run."""
        return "cuda" if self.leases and not is_fake() else "cpu"

    @property
    def is_soak(self) -> bool:
        """Whether the run looks for false alarms over fresh seeds, and is no evidence for the matrix."""
        return self._config.getoption("--seeds") is not None

    @property
    def seeds(self) -> range:
        """The seeds of every case."""
        first = cast(int, self._config.getoption("--seed"))
        return range(first, first + (self._config.getoption("--seeds") or 1))

    @property
    def results(self) -> Path:
        """The folder of the records; those of a soak stand apart, as nobody who looks for evidence should read them."""
        place = SOAKS if self.is_soak else Path("results", "local")
        return self._config.getoption("--results") or self._config.rootpath / place

    @cached_property
    def journals(self) -> Path:
        """The folder of this run's journals, which goes when the run ends."""
        return self.results / f".running-{uuid.uuid4().hex[:12]}"

    def case_at(self, nodeid: str) -> Case | None:
        """The case that the item of this name proves, if it proves one."""
        name, _, rest = nodeid.rpartition("::")[2].partition("[")
        return self.cases.get(rest.removesuffix("]")) if name in METHODS else None

    @cached_property
    def prover(self) -> Prover:
        """Imports torch."""
        share_cores()
        with made_to_stay():
            from refgrid.proving.proof import Prover

        return Prover(self.dataset, self.sources, self.device, self._config.getoption("--memory"))

    def lighten(self) -> None:
        """Leave much memory to a worker that has the device to itself; little is kept for the next case here."""
        if "prover" in self.__dict__:  # made, so that it may hold some
            self.prover.lighten()

    def cases_for(self, contract: type[ReferenceContract], method: str, file: Path) -> list[Case]:
        """The cases of one method of one test class, limited to the sizes asked for."""
        sizes = self._config.getoption("--test-sizes") or contract.test_sizes or _DEFAULT_SIZES
        return [
            case
            for name in self._names(contract, file)
            for case in self.by_definition.get((name, method), ())
            if case.size in sizes
        ]

    def _names(self, contract: type[ReferenceContract], file: Path) -> list[str]:
        foreign = self._config.getoption("--dataset") is not None
        if contract.definition_name is not None:
            return [] if foreign else [contract.definition_name]
        tested = set() if foreign else set(definitions_with_tests(file.parent))
        return [name for name in dict.fromkeys(c.definition for c in self.cases.values()) if name not in tested]


@contextmanager
def made_to_stay() -> Iterator[None]:
    """What is imported here stays until the process ends: no search for garbage looks through torch again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _demand_near(names: Collection[str], known: Collection[str]) -> None:
    """Raises UsageError for an unknown definition that is near to others: the list of all fills a screen."""
    for name in names:
        near = [] if name in known else get_close_matches(name, known)
        if near:
            raise pytest.UsageError(f"--definition-name {name!r} is not known; near it: {', '.join(near)}")

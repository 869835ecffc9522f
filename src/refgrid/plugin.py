"""The pytest plugin: one test a case, one record an outcome, and an account of all that was planned.

Torch is imported only inside a worker, when its first case runs.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Generator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from refgrid.case import SIZES, Case, Selection, plan
from refgrid.contract import METHODS, Prove, ReferenceContract, method_of
from refgrid.definition import DataSet, DefinitionError, load_dataset
from refgrid.expected import ExpectedError, ExpectedFailures, load_expected
from refgrid.finding import judge
from refgrid.generate import definitions_with_tests
from refgrid.options import add_options
from refgrid.record import BY_HAND, CUT, Verdict
from refgrid.recorder import Recorder
from refgrid.smaller import told_changes
from refgrid.sources import Sources
from refgrid.tolerance import tolerance_of

if TYPE_CHECKING:
    from refgrid.proof import Prover

_DEFAULT_SIZES = ("small", "medium")
_FOUND = pytest.StashKey[dict[str, Any]]()
_GRID = pytest.StashKey["Grid"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run."""
    add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker means; the controller keeps the records."""
    config.addinivalue_line("markers", "slow: a large size; runs only where --test-sizes names it")
    config.stash[_GRID] = Grid(config)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config, config.stash[_GRID]), "refgrid-recorder")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A name that the data set does not have ends the session here, before anything is collected."""
    option = session.config.getoption
    if option("--op-type") or option("--definition-name") or option("--dataset"):
        _ = session.config.stash[_GRID].cases


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
        selection = Selection(tuple(option("--op-type")), tuple(option("--definition-name")), SIZES, option("--seed"))
        serving = {op: self.sources.serving(op) for op in self.sources.ops}
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
        return {case_id: place for place, case_id in enumerate(self.cases)}

    @cached_property
    def expected(self) -> ExpectedFailures:
        """The known failures of this environment; raises UsageError for an entry that is not true any more."""
        option = self._config.getoption
        try:
            found = load_expected(self.root / "ci" / "expected_failures.toml", option("--environment"))
            if not option("--op-type") and not option("--definition-name"):
                found.check(self.cases)
        except ExpectedError as error:
            raise pytest.UsageError(str(error)) from error
        return found

    @cached_property
    def device(self) -> str:
        """Where cases run."""
        return cast(str, self._config.getoption("--device")) or _best_device()

    @cached_property
    def prover(self) -> Prover:
        """Imports torch."""
        _share_cores()
        from refgrid.proof import Prover

        return Prover(self.dataset, self.sources, self.device, self._config.getoption("--memory"))

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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test a case for every class that inherits the contract."""
    if not _is_contract(metafunc.cls) or metafunc.function.__name__ not in METHODS:
        return
    contract = cast("type[ReferenceContract]", metafunc.cls)
    grid = metafunc.config.stash[_GRID]
    cases = grid.cases_for(contract, metafunc.function.__name__, metafunc.definition.path)
    slow = pytest.mark.slow
    metafunc.parametrize(
        "case", [pytest.param(case, id=case.id, marks=slow if case.size == "large" else ()) for case in cases]
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put cases of one workload together and drop the placeholders of methods without a case."""
    grid = config.stash[_GRID]
    plain = [item for item in items if not _of_contract(item)]
    cases = [item for item in items if case_of(item)]
    cases.sort(key=lambda item: grid.order[cast(Case, case_of(item)).id])
    items[:] = plain + cases


@pytest.fixture
def prove(request: pytest.FixtureRequest) -> Prove:
    """Proves a case; what was measured goes into the record."""

    def run(case: Case) -> None:
        prover = request.config.stash[_GRID].prover
        found: dict[str, Any] = {}
        request.node.stash[_FOUND] = found
        try:
            bound = _bound_by_hand(request)
            proof = prover.prove(case, None if bound is None else tolerance_of(bound))
        except Exception as error:
            found["error"] = error
            verdict, reason = judge(error)
            if verdict.colour == "yellow":  # nobody reads its traceback, and formatting one costs 60 ms
                pytest.skip(f"{verdict.value}: {reason}")
            raise
        finally:
            found.update(seconds=prover.seconds, hashes=prover.hashes, axes=prover.axes, shrunk=prover.shrunk)
        found.update(comparisons=proof.comparisons, reason=_noted(proof.note, _bound_by_hand(request)))

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn how a case ended into its outcome, which travels with the report."""
    report = yield
    case = case_of(item)
    if case and (call.when == "call" or call.excinfo):
        found = item.stash.get(_FOUND, {})
        item.stash[_FOUND] = {}  # an error's traceback would keep the tensors of its case until the run ends
        error = found.get("error") or (call.excinfo.value if call.excinfo else None)
        outcome = _outcome(case, found, error, item.config.stash[_GRID].expected)
        report.user_properties.append(("refgrid", outcome))
        _colour(report, item, Verdict(outcome["verdict"]), outcome["reason"])
    return report


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test item proves, if it proves one."""
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")  # type: ignore[attr-defined]
    return case if isinstance(case, Case) else None


def _outcome(
    case: Case, found: dict[str, Any], error: BaseException | None, expected: ExpectedFailures
) -> dict[str, Any]:
    verdict, reason, comparisons = Verdict.MATCH, found.get("reason", ""), found.get("comparisons", ())
    if error is not None:
        verdict, reason = judge(error)
        comparisons = getattr(error, "comparisons", ())
    verdict, reason = expected.revise(case.id, verdict, reason)
    shrunk = found.get("shrunk", {})
    if shrunk:
        reason = "; ".join(part for part in (reason, CUT.format(told_changes(shrunk))) if part)
    return {
        "case": asdict(case),
        "verdict": verdict.value,
        "reason": reason,
        "comparisons": [comparison.to_dict() for comparison in comparisons],
        "seconds": {name: round(value, 6) for name, value in found.get("seconds", {}).items()},
        "hashes": found.get("hashes", {}),
        "axes": found.get("axes", {}),
        "shrunk": shrunk,
    }


def _colour(report: pytest.TestReport, item: pytest.Item, verdict: Verdict, reason: str) -> None:
    """Yellow verdicts are pytest's skips, each with its reason; red ones stay failures."""
    if verdict.colour == "yellow":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"{verdict.value}: {reason}")
    elif verdict is Verdict.EXPECTED:
        report.outcome, report.wasxfail = "skipped", reason
    elif verdict.colour == "red":
        report.outcome = "failed"
        report.longrepr = f"{verdict.value}: {reason}\n\n{report.longrepr}"


def _bound_by_hand(request: pytest.FixtureRequest) -> float | None:
    """What replaces the table of tolerances: the option, else the class's own; None where the table holds."""
    bound = request.config.getoption("--tolerance")
    return cast("type[ReferenceContract]", request.cls).tolerance if bound is None else cast(float, bound)


def _noted(note: str, bound: float | None) -> str:
    return "; ".join(part for part in (note, "" if bound is None else BY_HAND.format(f"{bound:g}")) if part)


def _is_contract(cls: type | None) -> bool:
    return cls is not None and issubclass(cls, ReferenceContract)


def _of_contract(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and _is_contract(item.cls) and item.originalname in METHODS


def _best_device() -> str:
    from refgrid.environment import gpus

    return "cuda" if gpus() else "cpu"


def _share_cores() -> None:
    """Workers on one CPU share its cores instead of each taking all; torch reads this once, at import."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

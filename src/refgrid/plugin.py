"""The pytest plugin: one test a case, one record an outcome, and an account of all that was planned.

Torch is imported only inside a worker, when its first case runs.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict
from typing import Any, cast

import pytest

from refgrid.caching.settled import Settled, tolerance_asked
from refgrid.contract import METHODS, Prove, ReferenceContract
from refgrid.dataset.case import Case
from refgrid.dataset.smaller import told_changes
from refgrid.proving.expected import ExpectedFailures
from refgrid.proving.finding import forget_locals, judge
from refgrid.proving.tolerance import tolerance_of
from refgrid.records.record import CUT, Verdict
from refgrid.running.budget import Budget
from refgrid.running.by_hand import ByHand, LooseTolerances
from refgrid.running.controller import leases_there, register_runner
from refgrid.running.ending import Ending
from refgrid.running.grid import Grid
from refgrid.running.options import add_options
from refgrid.running.recorder import Recorder
from refgrid.running.replay import replay_command

_FOUND = pytest.StashKey[dict[str, Any]]()
_GRID = pytest.StashKey[Grid]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of a run."""
    add_options(parser)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """What a process calls at its end, the latest to ask first."""
    early_config.pluginmanager.register(Ending(), "refgrid-ending")


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marker means; the controller keeps the records."""
    config.addinivalue_line("markers", "slow: a large size; runs only where --test-sizes names it")
    config.stash[_GRID] = Grid(config)
    if budget := config.getoption("--budget"):
        config.pluginmanager.register(Budget(config, budget), "refgrid-budget")
    config.pluginmanager.register(LooseTolerances(config.stash[_GRID]), "refgrid-loose-tolerances")
    settled = Settled(config, config.stash[_GRID])
    config.pluginmanager.register(settled, "refgrid-settled")
    recorder = None if hasattr(config, "workerinput") else Recorder(config, config.stash[_GRID], settled)
    register_runner(config, config.stash[_GRID], recorder)
    if recorder:
        config.pluginmanager.register(recorder, "refgrid-recorder")


def pytest_sessionstart(session: pytest.Session) -> None:
    """A name that the data set does not have ends the session here, before anything is collected."""
    option, grid = session.config.getoption, session.config.stash[_GRID]
    if option("--op-type") or option("--definition-name") or option("--dataset"):
        _ = grid.cases
    if option("--reason") and option("--tolerance") is None:
        raise pytest.UsageError("--reason is that of --tolerance, which is not given")


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """`-n auto`: one worker a lease; on a CPU as xdist has it."""
    return leases_there(config)


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
            bound = ByHand.of(request.config, request.cls).bound
            proof = prover.prove(case, None if bound is None else tolerance_of(bound))
        except Exception as error:
            forget_locals(error)
            found["error"] = error
            verdict, reason = judge(error)
            if verdict.colour == "yellow":  # nobody reads its traceback, and formatting one costs 60 ms
                pytest.skip(f"{verdict.value}: {reason}")
            raise
        finally:
            found.update(seconds=prover.seconds, hashes=prover.hashes, axes=prover.axes, shrunk=prover.shrunk)
        found.update(comparisons=proof.comparisons, reason=proof.note)

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
        outcome["hashes"] = {**outcome["hashes"], "tolerance": tolerance_asked(item)}
        if Verdict(outcome["verdict"]).colour != "yellow":  # which no tolerance had a part in
            outcome["reason"] = ByHand.of(item.config, getattr(item, "cls", None)).noted(outcome["reason"])
        if Verdict(outcome["verdict"]).colour == "red":
            device = "cuda" if item.config.stash[_GRID].leases else "cpu"
            replay = replay_command(item.config, item.nodeid, case, device)
            outcome["report"] = "\n".join(part for part in (getattr(error, "report", ""), f"replay: {replay}") if part)
        report.user_properties.append(("refgrid", outcome))
        colour(report, item, outcome)
    return report


def case_of(item: pytest.Item) -> Case | None:
    """The case that a test item proves, if it proves one."""
    callspec = getattr(item, "callspec", None)  # only what is parametrized has one
    case = callspec and callspec.params.get("case")
    return case if isinstance(case, Case) else None


def _outcome(
    case: Case, found: dict[str, Any], error: BaseException | None, expected: ExpectedFailures
) -> dict[str, Any]:
    verdict, reason, comparisons = Verdict.MATCH, found.get("reason", ""), found.get("comparisons", ())
    if error is not None:
        verdict, reason = judge(error)
        comparisons = getattr(error, "comparisons", ())
    verdict, reason = expected.revise(case.name, case.seed, verdict, reason, getattr(error, "outliers", ()))
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


def colour(report: pytest.TestReport, item: pytest.Item, outcome: dict[str, Any]) -> None:
    """Yellow verdicts are pytest's skips, each with its reason; red ones stay failures, each with its report."""
    verdict, reason = Verdict(outcome["verdict"]), outcome["reason"]
    if verdict.colour == "yellow":
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"{verdict.value}: {reason}")
    elif verdict is Verdict.EXPECTED:
        report.outcome, report.wasxfail = "skipped", reason
    elif verdict.colour == "red":
        report.outcome = "failed"
        report.longrepr = f"{verdict.value}: {reason}\n\n{outcome.get('report', '')}\n\n{report.longrepr}"


def _is_contract(cls: type | None) -> bool:
    return cls is not None and issubclass(cls, ReferenceContract)


def _of_contract(item: pytest.Item) -> bool:
    return isinstance(item, pytest.Function) and _is_contract(item.cls) and item.originalname in METHODS

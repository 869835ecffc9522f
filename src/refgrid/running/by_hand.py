"""Tolerances set by hand: what is looser than the source documents' table needs a reason, which records then carry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, cast

import pytest

from refgrid.proving.tolerance import EXACT, Tolerance, ceiling
from refgrid.records.record import BY_HAND

if TYPE_CHECKING:
    from refgrid.contract import ReferenceContract
    from refgrid.dataset.case import Case
    from refgrid.dataset.definition import DataSet
    from refgrid.running.grid import Grid


class ByHand(NamedTuple):
    """atol = rtol = `bound` in place of the table, None where the table holds; why, and where both were set."""

    bound: float | None
    reason: str
    where: str

    @classmethod
    def of(cls, config: pytest.Config, contract: type | None) -> ByHand:
        """The options', else the class's own."""
        if config.getoption("--tolerance") is not None:
            reason = config.getoption("--reason") or ""
            return cls(cast(float, config.getoption("--tolerance")), reason, "--tolerance")
        own = cast("type[ReferenceContract] | None", contract)
        if own is None or own.tolerance is None:
            return cls(None, "", "")
        return cls(own.tolerance, own.tolerance_reason, f"{own.__name__}.tolerance")

    def noted(self, reason: str) -> str:
        """The reason of an outcome that it touched, with its own."""
        if self.bound is None:
            return reason
        told = BY_HAND.format(f"{self.bound:g}") + (f": {self.reason}" if self.reason else "")
        return "; ".join(part for part in (reason, told) if part)

    def demand_reason(self, dataset: DataSet, cases: Iterable[Case]) -> None:
        """Raise UsageError, with the numbers, where it is looser than the table for an output of these cases."""
        if self.bound is None or self.reason.strip():
            return
        looser = list(_looser(self.bound, dataset, {case.definition for case in cases}))
        if looser:
            more = f" and {len(looser) - 1} more" if len(looser) > 1 else ""
            told = f"{self.where} {self.bound:g} is looser than the source documents' table: {looser[0]}{more}"
            option = "--reason TEXT" if self.where == "--tolerance" else 'tolerance_reason = "..." to the class'
            raise pytest.UsageError(f"{told}; add {option}, which every outcome under it will carry")


class LooseTolerances:
    """The plugin that ends a run of which a selected case would be held to a looser tolerance for no reason.

    Registered before what leaves settled cases out: the run has their outcomes, too.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """After `-k` and the like: what does not run needs no reason."""
        try:
            for bound, cases in _by_bound(config, items).items():
                bound.demand_reason(self._grid.dataset, cases)
        except pytest.UsageError as error:
            items.clear()  # or they would be recorded as planned
            if not hasattr(config, "workerinput"):
                raise
            # A worker that raises here is replaced by one that raises, too.
            told = pytest.CollectReport(error.args[0].partition(" ")[0], "failed", str(error), [])
            config.hook.pytest_collectreport(report=told)


def _by_bound(config: pytest.Config, items: Iterable[pytest.Item]) -> dict[ByHand, list[Case]]:
    """The cases of these items under each tolerance set by hand."""
    from refgrid.plugin import case_of

    found: dict[ByHand, list[Case]] = defaultdict(list)
    for item in items:
        if case := case_of(item):
            found[ByHand.of(config, cast(pytest.Function, item).cls)].append(case)
    return found


def _looser(bound: float, dataset: DataSet, names: Collection[str]) -> Iterator[str]:
    """What the table has for each dtype that the bound is looser for; whole numbers stay exact whatever is asked."""
    outputs = (
        (spec.dtype, f"{name}.{output}")
        for name in sorted(names)
        if (definition := dataset.definitions.get(name))
        for output, spec in definition.outputs.items()
    )
    for dtype, output in dict(reversed(list(outputs))).items():
        most: Tolerance = ceiling("*", dtype, "*")
        if most != EXACT and bound > min(most.atol, most.rtol):
            yield f"{dtype} has atol {most.atol:g}, rtol {most.rtol:g} ({output})"

"""Who runs what: whole units of work, the longest first, to whichever worker is free, as xdist's `--dist load`.

A worker that dies costs its own case only; what else it had goes to the front of the queue.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScheduling

from refgrid.dataset.case import Case
from refgrid.running.durations import estimates
from refgrid.running.units import bytes_of, unit_of

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

    from refgrid.running.controller import Controller
    from refgrid.running.grid import Grid

# Items at a worker. It begins one only when it knows the next, and the third is there when the first has ended.
_AHEAD = 3


class LongestFirst(LoadScheduling):
    """xdist's scheduler for crashing workers, with units instead of chunks and without waiting for slow starters."""

    collection: list[str] | None
    node2collection: dict[WorkerController, list[str]]
    node2pending: dict[WorkerController, list[int]]
    pending: list[int]

    def __init__(
        self, config: pytest.Config, log: Any, controller: Controller, grid: Grid, known: Mapping[str, float]
    ) -> None:
        """`known` are seconds that cases took before, by case id."""
        super().__init__(config, log)
        self._controller, self._grid, self._known = controller, grid, known
        self._unit_at: list[Hashable] = []
        self._split = self._told = False
        self._blameless: set[str] = set()

    @property
    def collection_is_completed(self) -> bool:
        """As soon as one worker is ready there is work to do; others may have to wait for a GPU.

        Where nobody is left, not before one has told what is planned: the end of a run without it leaves no record.
        """
        return bool(self.node2collection) or (self._told and self._controller.nobody_is_left)

    def add_node_collection(self, node: WorkerController, collection: Sequence[str]) -> None:
        """A worker without a lease, or one that has collected something else, gets no work."""
        self._told = True
        if node.gateway.id not in self._controller.refused and self.collection not in (None, list(collection)):
            self._reject(node)
        if node.gateway.id not in self._controller.refused:
            self.node2collection[node] = list(collection)
            return
        node.shutdown()
        if self._controller.nobody_is_left:
            self.pending.clear()

    def schedule(self) -> None:
        """Hand out work to every worker that wants some."""
        if self.collection is None and self.node2collection:
            self.collection = next(iter(self.node2collection.values()))
            self._queue_all(self.collection)
        for node in self.nodes:
            self.check_schedule(node)

    def check_schedule(self, node: WorkerController, duration: float = 0) -> None:  # noqa: ARG002 - xdist's own
        """Keep a worker busy; end it when it has nothing but its last item, which it begins only then."""
        if node.shutting_down or node not in self.node2collection:
            return
        while self.pending and len(self.node2pending[node]) < (2 if self._split else _AHEAD):
            self._send_tests(node, self._portion())
        if not self.pending and len(self.node2pending[node]) < 2:
            node.shutdown()

    def remove_node(self, node: WorkerController) -> str | None:
        """Queue what a worker leaves undone; returns the item that it died in, if it died in one."""
        left = self.node2pending.pop(node)
        guilty = self._died_in(node, left)
        self.pending[:0] = left
        for other in self.nodes:
            self.check_schedule(other)
        return guilty

    def _died_in(self, node: WorkerController, left: list[int]) -> str | None:
        """Take off the queue what needs no second run: the guilty item, or one whose outcome is already told."""
        if not left:
            return None
        assert self.collection is not None
        item = self.collection[left[0]]
        case, entry = self._grid.case_at(item), self._controller.entry(node.gateway.id)
        if case and entry and entry.ended == case.id:
            left.pop(0)
            return None
        if case and (entry is None or entry.running != case.id) and item not in self._blameless:
            self._blameless.add(item)  # once: a worker that always dies before it must not do so for ever
            return None
        left.pop(0)
        return item

    def _queue_all(self, collection: Sequence[str]) -> None:
        cases = [self._grid.case_at(nodeid) for nodeid in collection]
        self._unit_at = [unit_of(case) if case else nodeid for case, nodeid in zip(cases, collection, strict=True)]
        self._split = len(set(self._unit_at)) < self.numnodes
        seconds = self._seconds([case for case in cases if case])
        self.pending[:] = longest_first(self._unit_at, [seconds.get(case.id, 0.0) if case else 0.0 for case in cases])

    def _seconds(self, cases: Sequence[Case]) -> Mapping[str, float]:
        """What each case will take; a soak keeps its own order, for which none does."""
        return {} if self._grid.is_soak else estimates(cases, self._known, self._bytes_of)

    def _portion(self) -> int:
        """Items to hand out: a unit; where there are fewer units than workers, a part of one, later ones smaller."""
        unit = self._unit_at[self.pending[0]]
        size = sum(1 for _ in takewhile(lambda index: self._unit_at[index] == unit, self.pending))
        part = max(2, len(self.pending) // (2 * self.numnodes)) if self._split else size
        return min(size, part)

    def _reject(self, node: WorkerController) -> None:
        reason = f"{node.gateway.id} collected other cases than the first worker"
        self._controller.refuse(node.gateway.id, reason)
        report = pytest.CollectReport(nodeid=node.gateway.id, outcome="failed", longrepr=reason, result=[])
        self.config.hook.pytest_collectreport(report=report)

    def _bytes_of(self, case: Case) -> float:
        return bytes_of(self._grid.dataset, case)


def longest_first(unit_at: Sequence[Hashable], seconds: Sequence[float]) -> list[int]:
    """Indices of all items, unit by unit, those of the longest unit first; within a unit they keep their order."""
    units: dict[Hashable, list[int]] = defaultdict(list)
    for index, unit in enumerate(unit_at):
        units[unit].append(index)
    ordered = sorted(units.values(), key=lambda unit: -sum(seconds[index] for index in unit))
    return [index for unit in ordered for index in unit]

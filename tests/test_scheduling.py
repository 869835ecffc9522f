"""Who runs what: the order, the estimates, and the scheduler itself with workers whose clock is simulated."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from refgrid.dataset.case import Case
from refgrid.running.controller import Controller
from refgrid.running.journal import Entry
from refgrid.running.scheduling import LongestFirst, longest_first
from refgrid.running.units import unit_of

SOURCES = ("one", "two", "three")


def case(definition: str, workload: str = "b1", source: str = "one", op: str = "gemm") -> Case:
    return Case(definition, op, op, workload, "numerics", source)


class Worker:
    """A worker as xdist's: it begins an item when it knows the next one, or that there is none."""

    def __init__(self, name: str) -> None:
        self.gateway = SimpleNamespace(id=name)
        self.workerinput: dict[str, str] = {}
        self.queue: list[int] = []
        self.shutting_down = False
        self.busy = self.dead = False

    def send_runtest_some(self, indices: list[int]) -> None:
        assert not self.shutting_down, "work was sent to a worker that has been told to end"
        self.queue += indices

    def shutdown(self) -> None:
        self.shutting_down = True

    @property
    def can_begin(self) -> bool:
        return not self.busy and not self.dead and bool(self.queue) and (self.shutting_down or len(self.queue) > 1)


class Simulation:
    """A run of all cases on so many workers; `seconds` says what each takes, and took before if that was recorded."""

    def __init__(
        self,
        cases: list[Case],
        seconds: dict[str, float],
        workers: int,
        *,
        is_soak: bool = False,
        recorded: bool = True,
    ) -> None:
        self.cases, self.seconds, self.now = cases, seconds, 0.0
        self.entries: dict[str, Entry] = {}
        self.given_up: list[str] = []
        found = {each.id: each for each in cases}.get
        grid = SimpleNamespace(case_at=found, results=None, journals=None, dataset=None, is_soak=is_soak)
        hook = SimpleNamespace(pytest_collectreport=lambda report: self.rejected.append(report.longrepr))
        options = {"maxschedchunk": None, "--case-timeout": 600}
        config = SimpleNamespace(
            getvalue=lambda _: [f"{workers}*popen"], getoption=options.get, hook=hook, rootpath=Path()
        )
        self.rejected: list[str] = []
        self.controller = Controller(cast(Any, config), cast(Any, grid), self.given_up.append)
        self.controller.entry = self.entries.get  # type: ignore[assignment,method-assign]
        known = seconds if recorded else {}
        self.scheduler = LongestFirst(cast(Any, config), None, self.controller, cast(Any, grid), known)
        self.events: list[tuple[float, int, int, Worker]] = []
        self.tickets = itertools.count()
        self.ran: dict[str, list[int]] = defaultdict(list)
        self.least_ahead = 99
        self.workers = [self.start(f"gw{i}") for i in range(workers)]

    def start(self, name: str) -> Worker:
        worker = Worker(name)
        self.controller.pytest_configure_node(worker)
        self.scheduler.add_node(worker)
        return worker

    def collect(self, worker: Worker, ids: list[str] | None = None) -> None:
        self.scheduler.add_node_collection(worker, ids or [each.id for each in self.cases])
        if self.scheduler.collection_is_completed:
            self.scheduler.schedule()
        self.begin()

    def begin(self) -> None:
        for worker in [*self.scheduler.nodes]:
            if worker.can_begin:
                worker.busy = True
                took = self.seconds[self.cases[worker.queue[0]].id]
                heapq.heappush(self.events, (self.now + took, next(self.tickets), worker.queue[0], worker))

    def step(self) -> None:
        self.now, _, index, worker = heapq.heappop(self.events)
        if worker.dead:
            return
        worker.busy = False
        worker.queue.remove(index)
        self.ran[worker.gateway.id].append(index)
        self.scheduler.mark_test_complete(worker, index)
        if self.scheduler.pending:
            self.least_ahead = min(self.least_ahead, len(worker.queue))
        self.begin()

    def run(self) -> float:
        for worker in self.workers:
            self.collect(worker)
        while self.events:
            self.step()
        return self.now

    def die(self, worker: Worker) -> str | None:
        worker.dead = True
        self.controller.pytest_testnodedown(worker, None)
        return self.scheduler.remove_node(worker)

    @property
    def all_ran(self) -> list[int]:
        return sorted(index for indices in self.ran.values() for index in indices)


def grid_of_cases(units: int, seed: int = 0) -> tuple[list[Case], dict[str, float]]:
    """Units of three cases, whose seconds spread over three orders of magnitude as those of real ones do."""
    draw = random.Random(seed)
    cases = [case("d", f"b{unit}", source) for unit in range(units) for source in SOURCES]
    return cases, {each.id: 10 ** draw.uniform(-2, 1) for each in cases}


def bound(cases: list[Case], seconds: dict[str, float], workers: int) -> float:
    """What no schedule of whole units can beat: the longest unit, and an even share of all."""
    units: dict[Any, float] = defaultdict(float)
    for each in cases:
        units[unit_of(each)] += seconds[each.id]
    return max(*units.values(), sum(units.values()) / workers)


class TestScheduler:
    @pytest.mark.parametrize("workers", range(1, 17))
    def test_the_makespan_is_close_to_what_no_schedule_beats(self, workers: int) -> None:
        cases, seconds = grid_of_cases(400)
        simulation = Simulation(cases, seconds, workers)

        makespan = simulation.run()

        assert simulation.all_ran == list(range(len(cases)))
        assert makespan <= 1.02 * bound(cases, seconds, workers)

    def test_the_given_order_would_miss_that_bound(self) -> None:
        cases, seconds = grid_of_cases(40)
        last = case("d", "b39", "one").id
        seconds[last] = 60.0
        simulation = Simulation(cases, seconds, 4)
        in_order = simulation.run()
        simulation = Simulation(cases, seconds, 4, recorded=False)
        simulation.scheduler._bytes_of = lambda case: 0.0  # type: ignore[method-assign]  # noqa: ARG005 - its name

        assert simulation.run() > 1.5 * in_order

    def test_a_soak_keeps_the_given_order_however_long_a_unit_takes(self) -> None:
        cases, seconds = grid_of_cases(40)
        soak, ordinary = (Simulation(cases, seconds, 1, is_soak=is_soak) for is_soak in (True, False))
        for simulation in (soak, ordinary):
            simulation.run()

        assert soak.ran["gw0"] == list(range(len(cases)))
        assert ordinary.ran["gw0"] != soak.ran["gw0"]

    @pytest.mark.parametrize("workers", [1, 2, 5, 16])
    def test_a_unit_stays_with_one_worker_in_its_order(self, workers: int) -> None:
        cases, seconds = grid_of_cases(100)
        simulation = Simulation(cases, seconds, workers)
        simulation.run()

        for indices in simulation.ran.values():
            units = [unit_of(cases[index]) for index in indices]
            assert len(set(units)) * 3 == len(units)
            assert [index % 3 for index in indices] == [0, 1, 2] * (len(indices) // 3)

    def test_a_worker_always_has_two_items_while_there_are_any(self) -> None:
        simulation = Simulation(*grid_of_cases(100), 4)
        simulation.run()

        assert simulation.least_ahead >= 2

    @pytest.mark.parametrize(("units", "workers"), [(1, 2), (1, 16), (2, 3), (3, 8)])
    def test_fewer_units_than_workers_are_split(self, units: int, workers: int) -> None:
        cases = [case("d", f"b{unit}", f"s{i}") for unit in range(units) for i in range(12)]
        simulation = Simulation(cases, {each.id: 1.0 for each in cases}, workers)

        makespan = simulation.run()

        assert simulation.all_ran == list(range(len(cases)))
        assert makespan <= max(2, -(-units * 12 // workers) + 2)

    def test_work_begins_with_the_first_worker_and_late_ones_join(self) -> None:
        cases, seconds = grid_of_cases(50)
        simulation = Simulation(cases, seconds, 3)
        simulation.collect(simulation.workers[0])
        for _ in range(10):
            simulation.step()
        assert len(simulation.ran["gw0"]) == 10

        simulation.collect(simulation.workers[1])  # the third waits for a GPU that it never gets
        while simulation.events:
            simulation.step()

        assert simulation.all_ran == list(range(len(cases)))
        assert len(simulation.ran["gw1"]) > 20
        assert simulation.scheduler.tests_finished


class TestDeaths:
    def begun(self, workers: int = 2) -> tuple[Simulation, Worker, str]:
        """A run in which gw0 has done four items and is in its fifth."""
        simulation = Simulation(*grid_of_cases(20), workers)
        for worker in simulation.workers:
            simulation.collect(worker)
        while len(simulation.ran["gw0"]) < 4:
            simulation.step()
        first = simulation.workers[0]
        return simulation, first, simulation.cases[first.queue[0]].id

    def finish(self, simulation: Simulation, replaced: int = 1) -> None:
        for i in range(replaced):
            simulation.collect(simulation.start(f"gw{10 + i}"))
        while simulation.events:
            simulation.step()

    def test_a_worker_costs_the_case_that_it_was_in(self) -> None:
        simulation, worker, running = self.begun()
        index = worker.queue[0]
        simulation.entries["gw0"] = Entry("gw0", 1, 1, running=running)

        assert simulation.die(worker) == running

        self.finish(simulation)
        assert simulation.all_ran == [i for i in range(60) if i != index]

    def test_the_rest_of_its_unit_comes_next(self) -> None:
        simulation, worker, running = self.begun()
        simulation.entries["gw0"] = Entry("gw0", 1, 1, running=running)
        left = worker.queue[1:]

        simulation.die(worker)
        simulation.workers[1].dead = True
        replacement = simulation.start("gw2")
        simulation.collect(replacement)

        handed = [*simulation.workers[1].queue, *replacement.queue]
        assert [index for index in handed if index in left] == left

    def test_a_case_whose_outcome_is_told_is_not_blamed_again(self) -> None:
        simulation, worker, running = self.begun()
        index = worker.queue[0]
        simulation.entries["gw0"] = Entry("gw0", 1, 1, ended=running)

        assert simulation.die(worker) is None

        self.finish(simulation)
        assert simulation.all_ran == [i for i in range(60) if i != index]

    @pytest.mark.parametrize("entry", [None, Entry("gw0", 1, 1, ended="an earlier one")])
    def test_a_case_that_had_not_begun_runs_elsewhere(self, entry: Entry | None) -> None:
        simulation, worker, _ = self.begun()
        if entry:
            simulation.entries["gw0"] = entry

        assert simulation.die(worker) is None

        self.finish(simulation)
        assert simulation.all_ran == list(range(60))

    def test_a_case_before_which_two_workers_die_is_blamed(self) -> None:
        simulation = Simulation(*grid_of_cases(20), 1)
        simulation.collect(simulation.workers[0])
        first = simulation.cases[simulation.workers[0].queue[0]].id
        assert simulation.die(simulation.workers[0]) is None
        replacement = simulation.start("gw1")
        simulation.collect(replacement)

        assert simulation.die(replacement) == first

    def test_an_item_that_is_no_case_is_blamed_as_xdist_does(self) -> None:
        simulation = Simulation(*grid_of_cases(2), 1)
        simulation.scheduler._grid = cast(Any, SimpleNamespace(case_at=lambda _: None, is_soak=False))
        simulation.collect(simulation.workers[0])

        assert simulation.die(simulation.workers[0]) == simulation.cases[0].id


class TestRefusals:
    def test_a_worker_without_a_lease_gets_no_work(self) -> None:
        simulation = Simulation(*grid_of_cases(20), 2)
        simulation.controller.refuse("gw0", "no GPU within 30m")

        simulation.run()

        assert simulation.ran.keys() == {"gw1"}
        assert simulation.all_ran == list(range(60))
        assert simulation.workers[0].shutting_down
        assert simulation.given_up == []

    def test_a_run_without_any_lease_ends_with_the_reason(self) -> None:
        simulation = Simulation(*grid_of_cases(20), 2)
        for worker in simulation.workers:
            simulation.controller.refuse(worker.gateway.id, "no GPU within 30m")
            simulation.collect(worker)

        assert simulation.given_up == ["no GPU within 30m"]
        assert simulation.all_ran == []
        assert simulation.scheduler.tests_finished

    def test_a_run_without_any_lease_does_not_end_before_it_is_told_what_was_planned(self) -> None:
        simulation = Simulation(*grid_of_cases(20), 2)
        for worker in simulation.workers:
            simulation.controller.refuse(worker.gateway.id, "no GPU within 30m")

        assert not simulation.scheduler.tests_finished

        simulation.collect(simulation.workers[0])

        assert simulation.scheduler.tests_finished

    def test_a_worker_that_collected_something_else_is_rejected_and_said(self) -> None:
        simulation = Simulation(*grid_of_cases(20), 2)
        simulation.collect(simulation.workers[0])
        simulation.collect(simulation.workers[1], ["another"])
        while simulation.events:
            simulation.step()

        assert simulation.rejected == ["gw1 collected other cases than the first worker"]
        assert simulation.ran.keys() == {"gw0"}
        assert simulation.all_ran == list(range(60))


class TestOrder:
    def test_is_by_the_sum_of_a_unit(self) -> None:
        assert longest_first(["a", "a", "b", "c"], [1, 1, 1.5, 3]) == [3, 0, 1, 2]

    def test_keeps_the_given_order_among_equals(self) -> None:
        assert longest_first(["a", "b", "a", "b"], [1, 1, 1, 1]) == [0, 2, 1, 3]

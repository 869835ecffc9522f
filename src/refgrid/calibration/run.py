"""Runs the measurement: an op after the other, some draws of a workload at a time, in a few processes."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refgrid.calibration.chosen import SHARING, axes_of, choose, lightened
from refgrid.calibration.joined import in_order
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.dataset.memory import bytes_in_float64
from refgrid.environments.measured import Environment
from refgrid.records.record import now
from refgrid.running.dealing import dealt, rooms
from refgrid.sources import Sources

if TYPE_CHECKING:
    from refgrid.calibration.measure import Draws


@dataclass(frozen=True)
class Plan:
    """What to measure: `seeds` draws of each op, dealt to its workloads, on "cpu" or "cuda", in `processes`.

    `ops` in their order, empty for all, the heaviest first; no draws begin when the seconds of `budget` are over.
    """

    root: Path
    device: str
    seeds: int
    ops: tuple[str, ...] = ()
    processes: int = 1
    budget: float = math.inf


@dataclass(frozen=True)
class _Task:
    plan: Plan
    case: Case
    axes: Mapping[str, int]
    seeds: range
    need: float  # bytes of memory

    @property
    def name(self) -> str:
        return self.case.op


def measured(plan: Plan, environment: Environment) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name of each op as soon as it is done, with all that was measured so far, as data.

    Raises DealingError when no GPU is visible but asked for, a process dies or the budget does not suffice;
    DefinitionError as load_dataset.
    """
    ends = time.monotonic() + plan.budget
    tasks = _tasks(plan)
    left = Counter(task.name for task in tasks)
    draws: dict[Any, list[Any]] = defaultdict(list)
    absent: dict[str, dict[str, str]] = defaultdict(dict)  # by op
    for op, found, missing in dealt(tasks, _measure, rooms(plan.device), plan.processes, ends):
        for subject, distances in found.items():
            draws[subject] += distances
        absent[op].update(missing)
        left[op] -= 1
        if not left[op]:
            done = [task for task in tasks if not left[task.name]]
            yield op, _as_data(plan, environment, done, draws, absent)


def _as_data(
    plan: Plan, environment: Environment, done: Sequence[_Task], draws: Draws, absent: Mapping[str, Mapping[str, str]]
) -> dict[str, Any]:
    from refgrid.calibration.measure import told

    ops = {task.name for task in done}
    return {
        "environment": asdict(environment),
        "date": now(),
        "seeds": plan.seeds,
        "workloads": {task.case.id.removesuffix(f"-{task.case.check}"): task.axes for task in done},
        "measured": in_order(row for row in told(draws) if row["op"] in ops),
        "absent": dict(sorted((where, why) for op in ops for where, why in absent[op].items())),
    }


def written(measurement: Mapping[str, Any], file: Path) -> None:
    """One row a line: a change of one number is one line of a diff."""
    head = {name: value for name, value in measurement.items() if name != "measured"}
    lines = ",\n".join("  " + json.dumps(row) for row in measurement["measured"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "measured": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _tasks(plan: Plan) -> list[_Task]:
    """In the order of `plan.ops`, else the heaviest first; those of an op together, so that it is soon done."""
    sources, dataset = Sources(), _dataset(plan.root, plan.device)
    grouped: dict[str, list[Case]] = {op: [] for op in plan.ops}
    for case in choose(dataset, {op: sources.serving(op) for op in sources.ops}, plan.ops):
        grouped.setdefault(case.op, []).append(case)
    found = [list(_of_op(plan, dataset, cases)) for cases in grouped.values() if cases]
    if not plan.ops:
        found.sort(key=lambda tasks: max(task.need for task in tasks), reverse=True)
    return [task for tasks in found for task in tasks]


def _of_op(plan: Plan, dataset: DataSet, cases: Sequence[Case]) -> Iterator[_Task]:
    """Of all seeds workload `number` takes every so many-th, beginning with its number; a task has those of one share.

    A share is the seeds with the same weights, or all where each seed has its own.
    """
    sharing = SHARING[plan.device]
    length = sharing if sharing > 1 else plan.seeds
    for first in range(0, plan.seeds, length):
        for number, case in enumerate(cases):
            start, end = first + (number - first) % len(cases), min(first + length, plan.seeds)
            if start < end:
                axes = axes_of(dataset, case)
                need = bytes_in_float64(dataset.definitions[case.definition], axes)
                yield _Task(plan, case, axes, range(start, end, len(cases)), need)


@cache
def _dataset(root: Path, device: str) -> DataSet:
    """A GPU takes milliseconds for a draw of the heaviest definitions too, a CPU seconds."""
    dataset = load_dataset(root)
    return dataset if device == "cuda" else lightened(dataset)


def _measure(task: _Task) -> tuple[str, Draws, dict[str, str]]:
    import torch

    from refgrid.calibration.measure import Measurer

    torch.set_num_threads(1)
    measurer = Measurer(_dataset(task.plan.root, task.plan.device), Sources(), task.plan.device)
    measurer.measure(task.case, task.seeds)
    return task.name, measurer.draws, measurer.absent

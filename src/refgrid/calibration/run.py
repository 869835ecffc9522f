"""Runs the measurement: op after op, a few at a time, each in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refgrid.calibration.chosen import axes_of, choose, lightened
from refgrid.calibration.joined import in_order
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.dataset.memory import bytes_in_float64
from refgrid.environments.measured import Environment
from refgrid.records.record import now
from refgrid.running.dealing import dealt, rooms
from refgrid.sources import Sources


@dataclass(frozen=True)
class Plan:
    """What to measure: `seeds` draws of each op, dealt to its workloads, on "cpu" or "cuda", in `processes`."""

    root: Path
    device: str
    seeds: int
    ops: tuple[str, ...] = ()
    processes: int = 1


@dataclass(frozen=True)
class _Task:
    plan: Plan
    cases: tuple[Case, ...]
    axes: Mapping[str, Mapping[str, int]]  # by the case's id
    need: float  # bytes of memory, of the largest

    @property
    def name(self) -> str:
        return self.cases[0].op


def measured(plan: Plan, environment: Environment) -> Iterator[str | dict[str, Any]]:
    """The name of each op as soon as it is done, and at last the whole measurement as data.

    Raises DealingError when no GPU is visible but asked for, or a process dies; DefinitionError as load_dataset.
    """
    tasks = list(_tasks(plan))
    found: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for op, rows, missing in dealt(tasks, _measure, rooms(plan.device), plan.processes):
        found += rows
        absent.update(missing)
        yield op
    yield {
        "environment": asdict(environment),
        "date": now(),
        "seeds": plan.seeds,
        "workloads": {
            case.id.removesuffix(f"-{case.check}"): task.axes[case.id] for task in tasks for case in task.cases
        },
        "measured": in_order(found),
        "absent": dict(sorted(absent.items())),
    }


def written(measurement: Mapping[str, Any], file: Path) -> None:
    """One row a line: a change of one number is one line of a diff."""
    head = {name: value for name, value in measurement.items() if name != "measured"}
    lines = ",\n".join("  " + json.dumps(row) for row in measurement["measured"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "measured": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _tasks(plan: Plan) -> Iterator[_Task]:
    sources, dataset = Sources(), _dataset(plan)
    cases = choose(dataset, {op: sources.serving(op) for op in sources.ops}, plan.ops)
    for op in dict.fromkeys(case.op for case in cases):
        mine = tuple(case for case in cases if case.op == op)
        axes = {case.id: axes_of(dataset, case) for case in mine}
        need = max(bytes_in_float64(dataset.definitions[case.definition], axes[case.id]) for case in mine)
        yield _Task(plan, mine, axes, need)


def _dataset(plan: Plan) -> DataSet:
    """A GPU takes milliseconds for a draw of the heaviest definitions too, a CPU seconds."""
    dataset = load_dataset(plan.root)
    return dataset if plan.device == "cuda" else lightened(dataset)


def _measure(task: _Task) -> tuple[str, list[dict[str, Any]], dict[str, str]]:
    import torch

    from refgrid.calibration.measure import Measurer, told

    torch.set_num_threads(1)
    measurer = Measurer(_dataset(task.plan), Sources(), task.plan.device)
    for number, case in enumerate(task.cases):
        measurer.measure(case, _dealt(task.plan.seeds, number, len(task.cases)))
    return task.name, told(measurer.draws), measurer.absent


def _dealt(seeds: int, number: int, of: int) -> Sequence[int]:
    """Every seed once an op: workload `number` takes every `of`-th, beginning with its own number."""
    return range(number, seeds, of)

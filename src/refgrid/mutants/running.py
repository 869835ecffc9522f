"""Judges mutants at every workload of a size, a definition at a time in each process."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from refgrid.dataset.case import Size, op_of
from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.mutants.judging import Bench, Judgement, planted_in, sizes
from refgrid.mutants.planting import planted_module, planted_reference, self_test
from refgrid.mutants.table import Mutant, MutantError, Place, load_mutants
from refgrid.sources import Sources


@dataclass(frozen=True)
class Task:
    """One workload of one definition, and the mutants that are planted there."""

    root: str
    place: Place
    workload: str
    mutants: tuple[Mutant, ...]
    device: str


@dataclass(frozen=True)
class Told:
    """What a task found: judgements by the mutant's id, and for each source the documents' false alarms."""

    judged: dict[str, Judgement]
    alarms: dict[str, dict[str, bool]]


def demand_plantable(dataset: DataSet, mutants: Sequence[Mutant]) -> None:
    """Raise MutantError for a mutant whose place or whose text is not there; needs no library and no GPU."""
    ops = Sources().ops
    for mutant in mutants:
        place = mutant.where
        definition = dataset.definitions.get(place.definition)
        if definition is None:
            raise mutant.error(f"definition = {place.definition!r}, but the data set has none of that name")
        if place.workload not in {workload.uuid for workload in dataset.workloads[definition.name]}:
            raise mutant.error(f"workload = {place.workload!r}, but {definition.name} has none of that name")
        if mutant.adapter:
            planted_module(definition, op_of(definition, ops), mutant)
        else:
            planted_reference(definition, mutant)


def tasks(root: Path, dataset: DataSet, mutants: Sequence[Mutant], wanted: Collection[Size], device: str) -> list[Task]:
    """Every workload of the wanted sizes of each mutant's definition; those of one definition stand together."""
    by_place: dict[tuple[str, bool], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_place[mutant.where.definition, mutant.where.twin].append(mutant)
    found = []
    for here in by_place.values():
        place = here[0].where
        fitting = [name for name, size in sizes(planted_in(dataset, place)).items() if size in wanted]
        found += [Task(str(root), place, workload, tuple(here), device) for workload in fitting]
    return found


def run(todo: Sequence[Task], processes: int) -> Iterator[tuple[Task, Told]]:
    """Do all tasks, in as many processes; yields what each found as soon as it is done."""
    if processes <= 1:
        yield from ((task, perform(task)) for task in todo)
        return
    with multiprocessing.get_context("spawn").Pool(processes, initializer=_one_core) as pool:
        yield from pool.imap_unordered(_performed, todo)


def perform(task: Task) -> Told:
    """Judge the mutants of one task."""
    bench = Bench(planted_in(_dataset(task.root), task.place), task.workload, _sources(), task.device)
    judged = {mutant.id: bench.judge(mutant, by_documents=True) for mutant in task.mutants}
    against = {mutant.where.source for mutant in task.mutants}
    return Told(judged, {source: bench.false_alarms(source) for source in sorted(against)})


def self_tests(dataset: DataSet, mutants: Sequence[Mutant]) -> dict[str, str]:
    """What the self-test of its provider says of each faulty adapter, by the mutant's id; "" when it sees nothing."""
    ops = Sources().ops
    faulty = [(mutant, dataset.definitions[mutant.where.definition]) for mutant in mutants if mutant.adapter]
    return {mutant.id: self_test(of, op_of(of, ops), mutant) for mutant, of in faulty}


def chosen(root: Path, only: Sequence[str], device: str) -> tuple[list[Mutant], list[Mutant]]:
    """The mutants whose ids fit a glob, those of this device and the others. Raises MutantError when none fits."""
    every = load_mutants(root / "mutants")
    fitting = [mutant for mutant in every if not only or any(fnmatchcase(mutant.id, glob) for glob in only)]
    if not fitting:
        raise MutantError(f"--only {' '.join(only)}: fits none of {len(every)} mutants, such as {every[0].id!r}")
    here = [mutant for mutant in fitting if mutant.device == device or not mutant.adapter]
    return here, [mutant for mutant in fitting if mutant not in here]


def _performed(task: Task) -> tuple[Task, Told]:
    return task, perform(task)


def _one_core() -> None:
    import torch

    torch.set_num_threads(1)


@cache
def _dataset(root: str) -> DataSet:
    return load_dataset(Path(root))


@cache
def _sources() -> Sources:
    return Sources()

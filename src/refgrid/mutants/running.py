"""Judges mutants at the workloads of a size, in processes that any fault may end.

A mutant is planted at every small workload; at those of a larger size in turn, from small to large, until it is caught.

Each fault is let loose in calls of its own: once for the cases, once for each kind of inputs on which the documents'
checks run. Whichever of them ends the process is red, and the next begins in a fresh one. What the sound code itself
fails is found out before, so that no fault is blamed for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from refgrid.dataset.case import SIZES, Size, op_of
from refgrid.dataset.definition import DataSet, Definition, load_dataset
from refgrid.dataset.memory import growing_bytes
from refgrid.mutants import baseline
from refgrid.mutants.judging import Bench, Fate, Held, Judgement, checks_of, planted_in, sizes
from refgrid.mutants.planting import planted_module, planted_reference, self_test
from refgrid.mutants.report import DOCUMENTS_SIZE
from refgrid.mutants.table import Mutant, MutantError, Place, load_mutants
from refgrid.mutants.workers import Died, Worker, spread
from refgrid.records.record import Verdict
from refgrid.sources import Sources

_benches: dict[Task, Bench] = {}  # of this process: one at most


@dataclass(frozen=True)
class Task:
    """One workload of one definition, and the mutants that are planted there."""

    root: str
    place: Place
    workload: str
    mutants: tuple[Mutant, ...]
    device: str
    op: str
    size: Size = "small"

    @property
    def at(self) -> Task:
        """Where they are planted, without them."""
        return replace(self, mutants=())


@dataclass(frozen=True)
class Told:
    """What a task found: judgements by the mutant's id, and for each source the documents' false alarms.

    `unsound` says why the sound code is red, by what it was held to.
    """

    judged: Mapping[str, Judgement]
    alarms: Mapping[str, Mapping[str, bool]]
    unsound: Mapping[Held, str] = field(default_factory=dict)


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


def tasks(
    root: Path,
    dataset: DataSet,
    mutants: Sequence[Mutant],
    wanted: Collection[Size],
    device: str,
    settled: Collection[tuple[str, Size]] = (),
    most: int | None = None,
) -> list[Task]:
    """Every workload of the wanted sizes of each mutant's definition; those of one definition and size stand together.

    They stand from small to large. `settled` are mutants, by id, and the sizes at which they need not be planted,
    `most` the number of workloads that are taken of a size beyond small.
    """
    by_place: dict[tuple[str, bool], list[Mutant]] = defaultdict(list)
    for mutant in mutants:
        by_place[mutant.where.definition, mutant.where.twin].append(mutant)
    found = []
    for here in by_place.values():
        place, op = here[0].where, op_of(dataset.definitions[here[0].where.definition], _sources().ops)
        planted = planted_in(dataset, place)
        by_size = sizes(planted)
        for size in (each for each in SIZES if each in wanted):
            due = tuple(mutant for mutant in here if (mutant.id, size) not in settled)
            at = [workload for workload in _by_bytes(planted) if by_size[workload] == size and due]
            few = at if size == SIZES[0] else at[:most]
            found += [Task(str(root), place, workload, due, device, op, size) for workload in few]
    return found


def _by_bytes(dataset: DataSet) -> list[str]:
    """The workloads of the one definition, from small to large."""
    (definition,) = dataset.definitions.values()
    taken = {
        each.uuid: growing_bytes(definition, definition.axis_values(each.axes))
        for each in dataset.workloads[definition.name]
    }
    return sorted(taken, key=lambda workload: taken[workload])


def run(todo: Sequence[Task], processes: int, limit: int) -> Iterator[tuple[Task, Told]]:
    """Do all tasks, in as many processes; yields what each found, those of one size beyond small together.

    A fault that takes more than `limit` seconds is a hang. Raises Failed for what no fault is to blame for.
    """
    function = perform if processes == 1 else _perform_on_one_core
    for _, told in spread(_chains(todo), _in_turn, [Worker(function, limit) for _ in range(processes)]):
        yield from told


def _chains(todo: Sequence[Task]) -> list[list[Task]]:
    """Small workloads alone, those of one definition at a larger size together."""
    found: dict[tuple[object, ...], list[Task]] = defaultdict(list)
    for task in todo:
        alone = task.workload if task.size == SIZES[0] else ""
        found[task.place.definition, task.place.twin, task.size, alone].append(task)
    return list(found.values())


def _in_turn(worker: Worker, chain: Sequence[Task]) -> list[tuple[Task, Told]]:
    """What each task finds of the mutants that none before it has caught."""
    told, caught = list[tuple[Task, Told]](), set[str]()
    for task in chain:
        left = tuple(mutant for mutant in task.mutants if mutant.id not in caught)
        found = judged(worker, replace(task, mutants=left)) if left else Told({}, {})
        caught |= {name for name, judgement in found.judged.items() if judgement.fate == "caught"}
        told.append((task, found))
    return told


def judged(worker: Worker, task: Task) -> Told:
    """Judge the mutants of one task, the sound code first and last."""
    serving = _sources().serving(task.op)
    held = dict.fromkeys(each for mutant in task.mutants for each in checks_of(mutant, serving))
    unsound = {each: why for each in held if (why := _unsound(worker, task, each))}
    found = {mutant.id: _judged(worker, task, mutant, unsound) for mutant in task.mutants}
    sources = sorted({mutant.where.source for mutant in task.mutants})
    return Told(found, {source: _by_documents(worker, task, source) for source in sources}, unsound)


def _unsound(worker: Worker, task: Task, held: Held) -> str:
    try:
        return str(worker.call(task.at, "sound", *held))
    except Died as death:
        return f"{death.verdict.value}: {death.reason}"


def _judged(worker: Worker, task: Task, mutant: Mutant, unsound: Mapping[Held, str]) -> Judgement:
    """What becomes of a mutant there; nothing where the sound code serves neither the mutant nor any check of it."""
    held = checks_of(mutant, _sources().serving(task.op))
    own: Held = (mutant.where.source, "numerics")
    if not set(held) - set(unsound) or (mutant.adapter and own in unsound):
        return Judgement(task.workload, "not-run", reason=f"the sound code ends in {unsound[own]}")
    try:
        found: Judgement = worker.call(task.at, "judge", mutant, tuple(unsound))
    except Died as death:
        fate: Fate = "not-run" if death.verdict is Verdict.OOM else "caught"
        found = Judgement(task.workload, fate, death.verdict.value, reason=death.reason)
    if found.fate == "not-run":
        return found
    return replace(found, fixed=_by_documents(worker, task, mutant.where.source, mutant))


def _by_documents(worker: Worker, task: Task, source: str, mutant: Mutant | None = None) -> dict[str, bool]:
    """Which of the documents' checks are red; the end of its process fails any test, if it is the call's own doing."""
    found: dict[str, bool] = {}
    for inputs, checks in baseline.BY_INPUTS.items() if task.size == DOCUMENTS_SIZE else ():
        try:
            found |= worker.call(task.at, "by_documents", source, inputs, mutant)
        except Died as death:
            found |= dict.fromkeys(checks, death.verdict is not Verdict.OOM)
    return found


def perform(at: Task, what: str, *given: Any) -> Any:
    """Do one thing at the bench of a workload, which is kept for the next one there."""
    if at not in _benches:
        _benches.clear()
        _benches[at] = Bench(planted_in(_dataset(at.root), at.place), at.workload, _sources(), at.device)
    return getattr(_benches[at], what)(*given)


def self_tests(dataset: DataSet, mutants: Sequence[Mutant], processes: int, limit: int) -> dict[str, str]:
    """What the self-test of its provider says of each faulty adapter, by the mutant's id; "" when it sees nothing.

    The adapters of one op share a process, so that their libraries compile once what they need.
    """
    ops, by_op = Sources().ops, defaultdict[str, list[tuple[Definition, str, Mutant]]](list)
    for mutant in (each for each in mutants if each.adapter):
        definition = dataset.definitions[mutant.where.definition]
        by_op[op := op_of(definition, ops)].append((definition, op, mutant))
    workers = [Worker(self_test, limit) for _ in range(min(processes, len(by_op)))]
    if not workers:
        return {}
    return {name: said for _, told in spread(list(by_op.values()), _self_tests, workers) for name, said in told}


def _self_tests(worker: Worker, faulty: Sequence[tuple[Definition, str, Mutant]]) -> list[tuple[str, str]]:
    return [(mutant.id, _self_tested(worker, definition, op, mutant)) for definition, op, mutant in faulty]


def _self_tested(worker: Worker, *given: Any) -> str:
    try:
        return str(worker.call(*given))
    except Died as death:
        return f"{death.verdict.value}: {death.reason}"


def demand_device(device: str) -> str:
    """The name of the GPU, nothing for a CPU. Raises MutantError where torch sees none."""
    import torch

    if device != "cuda":
        return ""
    if not torch.cuda.is_available():
        raise MutantError("--device cuda: torch sees no GPU; without one, --device cpu")
    return str(torch.cuda.get_device_name())


def chosen(root: Path, only: Sequence[str], device: str) -> tuple[list[Mutant], list[Mutant]]:
    """The mutants whose ids fit a glob, those of this device and the others. Raises MutantError when none fits."""
    every = load_mutants(root / "mutants")
    fitting = [mutant for mutant in every if not only or any(fnmatchcase(mutant.id, glob) for glob in only)]
    if not fitting:
        raise MutantError(f"--only {' '.join(only)}: fits none of {len(every)} mutants, such as {every[0].id!r}")
    here = [mutant for mutant in fitting if mutant.device == device or not mutant.adapter]
    return here, [mutant for mutant in fitting if mutant not in here]


def _perform_on_one_core(*given: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return perform(*given)


@cache
def _dataset(root: str) -> DataSet:
    return load_dataset(Path(root))


@cache
def _sources() -> Sources:
    return Sources()

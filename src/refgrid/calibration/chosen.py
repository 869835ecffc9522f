"""Which workloads are drawn again and again: a few of each op, small enough for hundreds of draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace

from refgrid.dataset.case import Case, Selection, plan
from refgrid.dataset.definition import DataSet
from refgrid.dataset.memory import bytes_needed, weight_bytes
from refgrid.dataset.smaller import twin_of

MOST_BYTES = 6 * 2**20  # of inputs and outputs; where nothing is that small, so much more than the smallest
HEAVY, LIGHT = 2**25, 2**21  # bytes: weights of more than the first are taken as a twin's of at most the second
# Beside heavy weights, on a GPU, so much more than the smallest: of experts each that a token meets costs a draw time.
MOST_BESIDE_HEAVY = 2 * 2**20
# How many draws in a row have the same weights. On a GPU these are of the definition's own size, so that drawing them
# takes longer than all that is measured with them; each token then goes through others of them.
SHARING = {"cpu": 1, "cuda": 40}


def lightened(dataset: DataSet) -> DataSet:
    """The same definitions, those with heavy weights with smaller constants: a draw is then milliseconds.

    `choose` takes one of these only where an op has no others.
    """
    definitions = {
        name: twin_of(definition, dataset.workloads[name], HEAVY, LIGHT) or definition
        for name, definition in dataset.definitions.items()
    }
    return replace(dataset, definitions=definitions)


def axes_of(dataset: DataSet, case: Case) -> dict[str, int]:
    """Every axis of a case's definition, with the workload's."""
    definition = dataset.definitions[case.definition]
    workload = next(each for each in dataset.workloads[case.definition] if each.uuid == case.workload)
    return definition.axis_values(workload.axes)


def choose(dataset: DataSet, sources: Mapping[str, Collection[str]], ops: Collection[str] = ()) -> list[Case]:
    """Of each op and dtypes of its outputs: the largest serving size, the median one, and the largest edge size.

    `sources` maps each op to the names that serve it, `ops` are those that are wanted, empty for all.
    """
    grouped: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in plan(dataset, sources, Selection(sizes=("small",))):
        if case.check == "shape" and not case.twin and (not ops or case.op in ops):
            outputs = dataset.definitions[case.definition].outputs.values()
            grouped[(case.op, *(spec.dtype for spec in outputs))].append(case)
    return [case for group in grouped.values() for case in _few(dataset, group)]


def _few(dataset: DataSet, group: list[Case]) -> list[Case]:
    group = [case for case in group if not _is_light(dataset, case)] or group
    sized = sorted(((_bytes(dataset, case), case.id, case) for case in group), key=lambda each: each[:2])
    smallest, _, lightest = sized[0]
    is_heavy = weight_bytes(dataset.definitions[lightest.definition]) > HEAVY
    most = smallest + (MOST_BESIDE_HEAVY if is_heavy else MOST_BYTES)
    fitting = [case for size, _, case in sized if size <= most]
    plain, edges = ([case for case in fitting if case.edge is edge] for edge in (False, True))
    wanted = [*plain[-1:], *plain[len(plain) // 2 :][:1], *edges[-1:]]
    return list(dict.fromkeys(wanted))


def _is_light(dataset: DataSet, case: Case) -> bool:
    """A twin has another name than its definition."""
    return dataset.definitions[case.definition].name != case.definition


def _bytes(dataset: DataSet, case: Case) -> float:
    return bytes_needed(dataset.definitions[case.definition], axes_of(dataset, case))

"""Which workloads are drawn again and again: a few of each op, small enough for hundreds of draws."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from refgrid.dataset.case import Case, Selection, definition_of, plan
from refgrid.dataset.definition import DataSet
from refgrid.dataset.memory import bytes_needed

MOST_BYTES = 6 * 2**20  # of inputs and outputs; where nothing is that small, this much more than the smallest


def choose(dataset: DataSet, sources: Mapping[str, Collection[str]], ops: Collection[str] = ()) -> list[Case]:
    """Of each op and dtypes of its outputs: the largest serving size, the median one, and the largest edge size.

    `sources` maps each op to the names that serve it, `ops` are those that are wanted, empty for all.
    """
    grouped: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in plan(dataset, sources, Selection(sizes=("small",))):
        if case.check == "shape" and (not ops or case.op in ops):
            outputs = definition_of(dataset, case).outputs.values()
            grouped[(case.op, *(spec.dtype for spec in outputs))].append(case)
    return [case for group in grouped.values() for case in _few(dataset, group)]


def _few(dataset: DataSet, group: list[Case]) -> list[Case]:
    sized = sorted(((_bytes(dataset, case), case.id, case) for case in group), key=lambda each: each[:2])
    most = max(MOST_BYTES, sized[0][0] + MOST_BYTES)
    fitting = [case for size, _, case in sized if size <= most]
    plain, edges = ([case for case in fitting if case.edge is edge] for edge in (False, True))
    wanted = [*plain[-1:], *plain[len(plain) // 2 :][:1], *edges[-1:]]
    return list(dict.fromkeys(wanted))


def _bytes(dataset: DataSet, case: Case) -> float:
    definition = definition_of(dataset, case)
    workload = next(each for each in dataset.workloads[case.definition] if each.uuid == case.workload)
    return bytes_needed(definition, definition.axis_values(workload.axes))

"""A unit of work: the cases of one workload, which share its inputs and the reference's results."""

from __future__ import annotations

import zlib

from refgrid.dataset.case import Case, definition_of
from refgrid.dataset.definition import DataSet
from refgrid.dataset.memory import bytes_laid_out_anew

Unit = tuple[str, str, str, int]


def unit_of(case: Case) -> Unit:
    """The unit that a case belongs to."""
    return case.definition, case.twin, case.workload, case.seed


def spread(case: Case) -> tuple[int, int, str, str]:
    """A place in the order of a soak: seed by seed, and within one the definitions shuffled.

    However soon time is spent, no family was left out for another. The order of a definition's own cases stays.
    """
    return case.seed, zlib.crc32(f"{case.seed}/{case.definition}{case.twin}".encode()), case.definition, case.twin


def bytes_of(dataset: DataSet, case: Case) -> float:
    """What proving a case takes of a device's memory at most; nothing where there is nothing that could run."""
    if case.check == "definition":
        return 0.0
    definition = definition_of(dataset, case)
    workload = next(w for w in dataset.workloads[case.definition] if w.uuid == case.workload)
    return bytes_laid_out_anew(definition, definition.axis_values(workload.axes))

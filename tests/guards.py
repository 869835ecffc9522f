"""Faults planted into the data set's own references: whether the proof finds each, and names what it breaks.

A fault is a change of the text that runs, proven on a CPU as `nox -s matrix` does. One that changes nothing is refused:
its guard would pass or fail for another reason than the fault.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from refgrid.dataset.case import Case, Check, Size, op_of, size_of
from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.proving.finding import Finding
from refgrid.proving.proof import Prover
from refgrid.records.record import Verdict
from refgrid.sources import Sources


@dataclass(frozen=True)
class Fault:
    """What to change in the reference of which definition, at which workload; and the finding that must follow."""

    name: str
    where: tuple[str, str]
    sound: str
    broken: str
    told: str  # a regular expression that the reason must hold
    verdict: Verdict = Verdict.MISMATCH


@cache
def published() -> DataSet:
    """The repository's definitions and workloads, read once for all families of faults."""
    return load_dataset(Path(__file__).resolve().parents[1])


def prove(dataset: DataSet, where: tuple[str, str], source: str | None = "oracle", check: Check = "numerics") -> None:
    """Prove one case at a definition and a workload; raises what the proof finds."""
    name, workload = where
    definition, sources = dataset.definitions[name], Sources()
    case = Case(name, definition.op_type, op_of(definition, sources.ops), workload, check, source)
    Prover(dataset, sources, "cpu").prove(case)


def demand_caught(dataset: DataSet, fault: Fault, source: str | None = "oracle", check: Check = "numerics") -> None:
    """Fail unless the proof of the planted fault ends in its verdict, for the reason that it gives."""
    planted = _plant(dataset, fault)
    with pytest.raises(Finding) as caught:
        prove(planted, fault.where, source, check)
    found = caught.value
    assert found.verdict is fault.verdict, f"{fault.name}: {found.verdict}, but should be {fault.verdict}: {found}"
    assert re.search(fault.told, found.reason), f"{fault.name}: {found.reason!r} does not tell of {fault.told!r}"


def size(dataset: DataSet, where: tuple[str, str]) -> Size:
    """How large the case is: a small one is proven wherever the matrix is made."""
    name, uuid = where
    workload = next(workload for workload in dataset.workloads[name] if workload.uuid == uuid)
    return size_of(dataset.definitions[name], workload)


def _plant(dataset: DataSet, fault: Fault) -> DataSet:
    name = fault.where[0]
    sound = dataset.definitions[name]
    absent = f"{fault.sound!r} is not in the reference of {name}: the fault plants nothing"
    assert fault.sound in sound.reference, absent
    changed = replace(sound, reference=sound.reference.replace(fault.sound, fault.broken))
    return replace(dataset, definitions={name: changed})

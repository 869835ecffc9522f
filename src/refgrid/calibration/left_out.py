"""Truths whose draws derive no row: they are of a known fault, or of other sizes than the truth's own limit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from refgrid.calibration.broken import op_of_case
from refgrid.calibration.rounding import FLOAT64, REFERENCE
from refgrid.dataset.definition import DataSet
from refgrid.proving.expected import ExpectedFailures, load_expected
from refgrid.proving.tolerance import uncalibrated

_DRAWN = 1  # any seed but 0: draws are of fresh inputs


def left_out(measurement: Mapping[str, Any], dataset: DataSet) -> dict[tuple[str, str], str]:
    """By op and truth, why; the dataset has the known faults of each environment in its ci/expected_failures.toml."""
    environment = measurement["environment"]
    file = dataset.root / "ci" / "expected_failures.toml"
    expected = load_expected(file, environment["name"], environment["device"])
    found = {}
    for row in measurement["measured"]:
        op, truth = row["op"], row["against"]
        if row["who"] == REFERENCE and truth != FLOAT64:
            cases = dict(_cases(measurement, op))
            why = _known_fault(cases, truth, expected) or _other_sizes(cases, row, environment["device"], dataset)
            if why:
                found[op, truth] = why
    return found


def _cases(measurement: Mapping[str, Any], op: str) -> Iterator[tuple[str, Mapping[str, int]]]:
    ops = {row["op"] for row in measurement["measured"]}
    return ((case, axes) for case, axes in measurement["workloads"].items() if op_of_case(case, ops) == op)


def _known_fault(cases: Mapping[str, Mapping[str, int]], truth: str, expected: ExpectedFailures) -> str:
    """A tolerance that let a fault through would let it through everywhere."""
    names = [f"{case}-{truth}" for case in cases]
    return next((e.reason for e in expected.entries if any(e.covers(name, _DRAWN) for name in names)), "")


def _other_sizes(cases: Mapping[str, Mapping[str, int]], row: Mapping[str, Any], device: str, dataset: DataSet) -> str:
    """A limit of its own is for what a library does besides rounding its output, and how much that is depends on sizes.

    Rounding a tensor to 8 bits under one scale weighs the more the fewer numbers are summed afterwards.
    """
    key = row["op"], row["dtype"], row["output"]
    if uncalibrated(*key, f"{row['against']} on {device}") == uncalibrated(*key):
        return ""
    lighter = dict.fromkeys(change for case, axes in cases.items() for change in _changes(case, axes, dataset))
    return f"its own limit is of the definition's sizes, and drawn were {', '.join(lighter)}" if lighter else ""


def _changes(case: str, axes: Mapping[str, int], dataset: DataSet) -> Iterator[str]:
    """Constants of the definition that were others in the draws."""
    for axis, held in dataset.definitions[case.partition("-")[0]].axes.items():
        if held.value is not None and held.value != axes[axis]:
            yield f"{axis} = {axes[axis]} for {held.value}"

"""Tolerances: what `match` means for one output of one op in one dtype, held against one truth.

`|actual - expected| <= atol + rtol * |expected|`, elementwise, for at least `required_matched_ratio` of the elements,
and each row no further off than `row_norm` of its own norm. The numbers are data beside this module: tolerance.toml
holds the ceilings of the source documents and the truths known to be less precise, tolerance.json what calibration made
tighter, with the measurements behind it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEPT = Path(__file__).with_suffix(".toml")
CALIBRATED = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class Tolerance:
    """atol in the output's unit, rtol relative to the ground truth, and the share of elements that must be within.

    `row_norm` bounds |actual - expected| of a row, as a vector, relative to |expected|; None leaves rows unbounded.
    """

    atol: float
    rtol: float
    required_matched_ratio: float = 1.0
    row_norm: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol), ("row_norm", self.row_norm or 0.0)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}, but should be finite and at least 0")
        if not 0 < self.required_matched_ratio <= 1:
            raise ValueError(f"required_matched_ratio = {self.required_matched_ratio}, but should be in (0, 1]")


EXACT = Tolerance(0.0, 0.0)


@dataclass(frozen=True)
class TruthLimit:
    """Where a truth is itself less precise than the table asks; patterns, and the measurement behind the bound."""

    truth: str  # a source and its device, "torch on cpu"
    op: str
    dtype: str  # of the output
    output: str
    tolerance: Tolerance
    measured: str

    def fits(self, truth: str, op: str, dtype: str, output: str) -> bool:
        """Whether it holds there."""
        return all(map(fnmatchcase, (truth, op, dtype, output), (self.truth, self.op, self.dtype, self.output)))


def _table(kept: Mapping[str, Any]) -> dict[tuple[str, str, str], tuple[Tolerance, str]]:
    return {("*", row["dtype"], "*"): (_tolerance(row), row["source"]) for row in kept["ceiling"]}


def _limits(kept: Mapping[str, Any]) -> Iterator[TruthLimit]:
    for row in kept["limit"]:
        for truth in row["truths"]:
            yield TruthLimit(truth, row["op"], row["dtype"], row["output"], _tolerance(row), row["measured"])


def _tolerance(row: Mapping[str, Any]) -> Tolerance:
    return Tolerance(row["atol"], row["rtol"], row.get("ratio", 1.0), row.get("row_norm"))


_KEPT = tomllib.loads(KEPT.read_text(encoding="utf-8"))

# (op, dtype, output) -> tolerance and where it comes from; "*" stands for any.
TABLE: dict[tuple[str, str, str], tuple[Tolerance, str]] = _table(_KEPT)
TRUTH_LIMITS: tuple[TruthLimit, ...] = tuple(_limits(_KEPT))


@cache
def calibrated() -> Mapping[tuple[str, str, str, str], Tolerance]:
    """The rows of calibration by truth, op, dtype and output: one a truth, since each has an error of its own."""
    if not CALIBRATED.is_file():
        return {}
    rows = json.loads(CALIBRATED.read_text(encoding="utf-8"))["rows"]
    return {(row["truth"], row["op"], row["dtype"], row["output"]): _tolerance(row) for row in rows}


def tolerance_for(op: str, dtype: str, output: str, truth: str = "") -> Tolerance:
    """The tolerance of one output of one op in one dtype; `truth` is a source and its device, as "torch on cpu".

    Raises ValueError for a dtype without a row, naming those that have one.
    """
    return calibrated().get((truth, op, dtype, output)) or uncalibrated(op, dtype, output, truth)


def uncalibrated(op: str, dtype: str, output: str, truth: str = "") -> Tolerance:
    """The same without what calibration made tighter: the truth's own limit, else the ceiling."""
    for limit in TRUTH_LIMITS:
        if limit.fits(truth, op, dtype, output):
            return limit.tolerance
    return ceiling(op, dtype, output)


def ceiling(op: str, dtype: str, output: str) -> Tolerance:
    """What no truth exceeds without a measurement of its own; raises ValueError as `tolerance_for`."""
    for key in ((op, dtype, output), (op, dtype, "*"), ("*", dtype, output), ("*", dtype, "*")):
        if key in TABLE:
            return TABLE[key][0]
    known = sorted({dtype for _, dtype, _ in TABLE})
    raise ValueError(f"dtype {dtype!r} has no tolerance; dtypes that have one: {', '.join(known)}")


def tolerance_of(bound: float) -> Tolerance:
    """One number for both, atol = rtol = bound, for every element: what `--tolerance` asks for in place of the table.

    Raises ValueError for a bound that is negative or not finite.
    """
    return Tolerance(bound, bound)


def looser(one: Tolerance, other: Tolerance) -> Tolerance:
    """What two truths that are compared with each other may differ by: the bound of the less precise."""
    ratio = min(one.required_matched_ratio, other.required_matched_ratio)
    rows = None if one.row_norm is None or other.row_norm is None else max(one.row_norm, other.row_norm)
    return Tolerance(max(one.atol, other.atol), max(one.rtol, other.rtol), ratio, rows)

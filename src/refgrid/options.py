"""The options of a run, and what each may be."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from refgrid.case import SIZES, parse_sizes
from refgrid.memory import parse_bytes


def add_options(parser: pytest.Parser) -> None:
    """Add the group "refgrid" to pytest's options."""
    group = parser.getgroup("refgrid", "references against ground truth")
    add = group.addoption
    add("--dataset", type=Path, metavar="DIR", help="data set to test (default: the one of this checkout)")
    add("--device", choices=("cpu", "cuda"), help="where cases run (default: cuda if a driver is here, else cpu)")
    add("--environment", default=os.environ.get("REFGRID_ENVIRONMENT", "local"), help="name of the matrix column")
    add("--op-type", action="append", default=[], metavar="T", help="only this op_type; may be repeated")
    add("--definition-name", action="append", default=[], metavar="N", help="only this definition; may be repeated")
    add("--test-sizes", type=_sizes, metavar="|".join(SIZES), help="comma-separated (default: small,medium)")
    add("--tolerance", type=_tolerance, metavar="X", help="atol = rtol = X instead of the table; recorded as such")
    add("--memory", type=_memory, default=math.inf, metavar="M", help="most a worker may take, as 2GiB (default: all)")
    add("--seed", type=int, default=0, help="seed of all inputs (default: 0)")
    add("--results", type=Path, metavar="DIR", help="folder of the records (default: results/local)")
    add("--progress", action="store_true", help="one progress bar instead of a letter a test")


def _sizes(text: str) -> tuple[str, ...]:
    try:
        return parse_sizes(text)
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise pytest.UsageError(f"--tolerance {text!r} is no tolerance; legal values: a finite number >= 0")
    return value


def _memory(text: str) -> float:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise pytest.UsageError(f"--memory {error}") from error

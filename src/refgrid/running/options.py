"""The options of a run, and what each may be."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from refgrid.dataset.case import CHECKS, SIZES, parse_checks, parse_sizes
from refgrid.dataset.memory import parse_bytes
from refgrid.running.budget import parse_duration
from refgrid.running.lease import FOLDER


def add_options(parser: pytest.Parser) -> None:
    """Add the group "refgrid" to pytest's options."""
    group = parser.getgroup("refgrid", "references against ground truth")
    add = group.addoption
    add("--dataset", type=Path, metavar="DIR", help="data set to test (default: the one of this checkout)")
    add("--device", choices=("cpu", "cuda"), help="where cases run (default: cuda if a driver is here, else cpu)")
    add("--environment", default=os.environ.get("REFGRID_ENVIRONMENT", "local"), help="name of the matrix column")
    add("--no-audit", action="store_true", help="leave unchecked whether this is the environment that its name says")
    add("--op-type", action="append", default=[], metavar="T", help="only this op_type; may be repeated")
    add("--definition-name", action="append", default=[], metavar="N", help="only this definition; may be repeated")
    add("--test-sizes", type=_listed(parse_sizes), metavar="|".join(SIZES), help="comma-separated (small,medium)")
    add("--checks", type=_listed(parse_checks), default=(), metavar="C", help=f"some of {', '.join(CHECKS)} (all)")
    add("--tolerance", type=_tolerance, metavar="X", help="atol = rtol = X instead of the table; recorded as such")
    add("--reason", metavar="TEXT", help="why --tolerance is looser than the source documents' table; recorded")
    add("--memory", type=_memory, default=math.inf, metavar="M", help="most a worker may take, as 2GiB (default: all)")
    add(
        "--budget",
        type=_duration("--budget"),
        metavar="20m",
        help="when it is spent, cases that have not begun are not-run",
    )
    add("--seed", type=_whole("--seed", 0), default=0, metavar="S", help="seed of all inputs (default: 0)")
    add("--seeds", type=_whole("--seeds", 1), metavar="N", help="soak: every case over N seeds from --seed on")
    add("--no-cache", action="store_true", help="run also what is unchanged since its last outcome")
    add("--resume", action="store_true", default=True, help="go on with a run that was left before its end (default)")
    add("--no-resume", dest="resume", action="store_false", help="begin a new run")
    add("--explain", action="store_true", help="say of every case why it was run or not, and what its key is made of")
    add("--results", type=Path, metavar="DIR", help="folder of the records (default: results/local)")
    add("--case-timeout", type=_duration("--case-timeout"), default=600, metavar="10m", help="then a case hangs (10m)")
    add(
        "--workers-per-gpu",
        type=_whole("--workers-per-gpu", 1),
        default=1,
        metavar="N",
        help="so many leases on each GPU (default: 1)",
    )
    add(
        "--lease-timeout", type=_duration("--lease-timeout"), default=1800, metavar="30m", help="longest wait for a GPU"
    )
    add("--lease-folder", type=Path, default=_lease_folder(), metavar="DIR", help="the same for all runs on a machine")
    add("--progress", action="store_true", help="one progress bar instead of a letter a test")


def _listed(known: Callable[[str], tuple[str, ...]]) -> Callable[[str], tuple[str, ...]]:
    def parse(text: str) -> tuple[str, ...]:
        try:
            return known(text)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error

    return parse


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


def _duration(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return parse_duration(text)
        except ValueError as error:
            raise pytest.UsageError(f"{option} {error}") from error

    return parse


def _whole(option: str, least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise pytest.UsageError(f"{option} {text!r} should be a whole number from {least}")
        return int(text)

    return parse


def _lease_folder() -> Path:
    return Path(os.environ.get("REFGRID_LEASES") or FOLDER)

"""Runs made by hand, and what a matrix of them says."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from refgrid.dataset.case import Case, Check
from refgrid.environments.measured import Environment
from refgrid.records.record import Header, Outcome, Run, Verdict
from refgrid.report.cell import Cell
from refgrid.report.matrix import Matrix
from refgrid.report.row import Row
from refgrid.report.terminal import print_matrix

CPU = Environment(
    "cpu", "cpu", "3.11.9", "linux x86_64", "2.13.0", None, None, None, None, 0, {"transformers": "4.57.1"}
)
H200 = replace(
    CPU,
    name="cu130",
    device="cuda",
    torch="2.11.0",
    cuda="13.0",
    driver="580.95.05",
    gpu="NVIDIA H200",
    gpu_count=1,
)
OLD, NEW = "2026-08-01T06:00:00+00:00", "2026-11-20T06:00:00+00:00"
NEEDS_GPU = "not-run: needs an NVIDIA GPU: run `nox -s tests-cu130` on such a machine"

Told = Verdict | tuple[Verdict, str]


def case(source: str = "torch", op: str = "gemm", workload: int = 1) -> Case:
    check: Check = "numerics"
    if source in ("shape", "dtype", "determinism", "agreement"):
        check = source  # type: ignore[assignment]
    return Case(f"{op}_n4", op, op, f"m{workload}", check, None if check != "numerics" else source)


def cases(count: int, source: str = "torch", op: str = "gemm") -> list[Case]:
    return [case(source, op, workload) for workload in range(count)]


BROKEN = Case("gemm_n4", "gemm", "gemm", "", "definition")


def run(
    told: dict[Case, Told],
    *,
    started: str = NEW,
    environment: Environment = CPU,
    planned: Sequence[Case] | None = None,
    finished: bool = True,
    name: str = "new",
    **outcome: Any,
) -> Run:
    """A run that planned what it tells of, or more."""
    outcomes = {}
    for of, verdict in told.items():
        word, reason = verdict if isinstance(verdict, tuple) else (verdict, "")
        outcomes[of.id] = Outcome(of, word, reason, **outcome)
    header = Header(name, started, "0.1.0", environment, tuple(told if planned is None else planned))
    return Run(header, outcomes, finished, Path("results") / f"{name}.jsonl")


def all_are(verdict: Told, of: Sequence[Case]) -> dict[Case, Told]:
    return dict.fromkeys(of, verdict)


def cell(matrix: Matrix, op: str = "gemm", against: str | None = None, column: int = 0) -> Cell:
    (row,) = [row for row in matrix.rows if (row.op, row.against) == (op, against)]
    return row.cells[column]


def names(rows: Sequence[Row]) -> list[str]:
    return [row.op if row.against is None else f"{row.op}/{row.against}" for row in rows]


def printed(matrix: Matrix, width: int = 100, encoding: str = "utf-8") -> str:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    print_matrix(matrix, Console(file=file, width=width, color_system=None), Path(os.devnull))
    file.seek(0)
    return file.read()

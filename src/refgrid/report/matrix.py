"""The compatibility matrix: records in, a table of environments and ops out, in which every cell says why.

Rows are ops and, below each, what it is held against. A blank is never a pass: what nobody planned says so.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from refgrid.records.record import Run, Verdict
from refgrid.report.cell import Cell, told, total
from refgrid.report.column import Column, columns
from refgrid.report.difference import Difference, differences
from refgrid.report.reason import Reason, worst_first
from refgrid.report.row import DefinitionRow, Row, definition_rows, rows
from refgrid.report.standing import histories

SYMBOLS: Mapping[str, str] = {"red": "✗", "yellow": "?", "green": "✓"}


@dataclass(frozen=True)
class Matrix:
    """Columns, rows by op (worst first), the same by definition (by name), reasons (worst first) and differences."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    definitions: tuple[DefinitionRow, ...]
    reasons: tuple[Reason, ...]
    differences: tuple[Difference, ...] = ()

    @property
    def counts(self) -> dict[Verdict, int]:
        """Every outcome of the matrix by its verdict, worst first."""
        return total(cell for row in self.rows if row.against is None for cell in row.cells)

    @property
    def planned(self) -> int:
        """What the headers of the runs owe."""
        return sum(column.planned for column in self.columns)

    @property
    def exit_code(self) -> int:
        """1 when a cell is red or a planned case is not accounted for, 2 when nothing was proven, else 0."""
        found = {verdict.colour for verdict in self.counts}
        if "red" in found or self.planned != sum(self.counts.values()):
            return 1
        return 0 if "green" in found else 2

    @property
    def summary(self) -> str:
        """Planned = accounted, in one line; begins with "error" when they differ."""
        accounted, verdicts = sum(self.counts.values()), told(self.counts) or "nothing"
        if self.planned != accounted:
            return f"error: planned {self.planned} but accounted {accounted}: {verdicts}"
        proven = "" if self.exit_code in (0, 1) else "; nothing was proven"
        return f"planned {self.planned} = accounted {accounted}: {verdicts}{proven}"


def build(
    runs: Sequence[Run], declared: Mapping[str, str] | None = None, published: Mapping[str, str] | None = None
) -> Matrix:
    """The matrix of all runs; for `declared` and `published` see `assemble`."""
    return assemble(columns(histories(runs)), declared or {}, published or {})


def assemble(recorded: Sequence[Column], declared: Mapping[str, str], published: Mapping[str, str]) -> Matrix:
    """The matrix of columns with records, and of those that are only declared.

    `declared` maps environments to why they may have no record here, `published` definitions to their op_types.
    """
    names = {column.environment.name for column in recorded if column.environment}
    empty = [Column(name, reason=reason) for name, reason in declared.items() if name not in names]
    found = (*sorted(recorded, key=lambda column: column.title), *empty)
    reasons = worst_first(reason for column in found for reason in column.reasons)
    return Matrix(found, rows(found), definition_rows(found, published), reasons, differences(found))


def libraries(column: Column) -> list[str]:
    """Each ground-truth distribution of the column with its version."""
    found = column.environment.libraries if column.environment else {}
    return [f"{name} {version}" for name, version in sorted(found.items()) if name != "torch"]


def measured(column: Column) -> str:
    """The day, or the oldest and the newest day, that the column's outcomes are of."""
    days = sorted({date[:10] for date in column.dates or ()})
    return " to ".join(days) or "not run"


def shown(row: Row, cell: Cell) -> str:
    """A cell with its symbol; where a source was matched throughout, how much of the tolerance was used."""
    return f"{SYMBOLS[cell.colour]} {cell.text}{_used(cell) if row.against else ''}"


def told_in_full(cell: Cell) -> str:
    """A cell of a definition: with how much of the tolerance was used, and how many cases were cut to fit."""
    cut = f" · {cell.shrunk} cut to fit" if cell.shrunk else ""
    return f"{SYMBOLS[cell.colour]} {cell.text}{_used(cell)}{cut}"


def _used(cell: Cell) -> str:
    known = cell.colour == "green" and cell.headroom is not None and math.isfinite(cell.headroom)
    return f" · {math.ceil(100 * (cell.headroom or 0))}%" if known else ""


def write_files(matrix: Matrix, folder: Path) -> list[Path]:
    """Write matrix.md and matrix.json, each whole or not at all; returns both.

    Raises OSError when the folder cannot take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "matrix.md": _markdown(matrix),
        "matrix.json": json.dumps(to_dict(matrix), indent=1, allow_nan=False),
    }
    return [replace_file(folder / name, text) for name, text in texts.items()]


def replace_file(file: Path, text: str) -> Path:
    """Write a file whole or not at all; returns it."""
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def _markdown(matrix: Matrix) -> str:
    jinja = jinja2.Environment(loader=jinja2.PackageLoader("refgrid"), trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = escaped
    names = {"libraries": libraries, "measured": measured, "symbols": SYMBOLS}
    names |= {"shown": shown, "told_in_full": told_in_full}
    return jinja.get_template("matrix.md.j2").render(matrix=matrix, **names)


def escaped(text: str) -> str:
    """Text that ends neither its cell nor its line and is no markup."""
    return re.sub(r"([|<>*_`\\[\]])", r"\\\1", " ".join(text.split()))


def to_dict(matrix: Matrix) -> dict[str, Any]:
    """Everything as plain data, for strict JSON."""
    return {
        "summary": matrix.summary,
        "exit_code": matrix.exit_code,
        "planned": matrix.planned,
        "verdicts": _by_word(matrix.counts),
        "columns": [_column(column) for column in matrix.columns],
        "rows": [_row(row) for row in matrix.rows],
        "definitions": [
            {
                "op_type": row.op_type,
                "definition": row.definition,
                "twin": row.twin,
                "cells": list(map(_plain, row.cells)),
            }
            for row in matrix.definitions
        ],
        "reasons": [{**asdict(reason), "verdict": reason.verdict.value} for reason in matrix.reasons],
        "differences": [_difference(difference) for difference in matrix.differences],
    }


def _column(column: Column) -> dict[str, Any]:
    environment = asdict(column.environment) if column.environment else None
    remarks = {"findings": list(column.findings), "notes": list(column.notes)}
    told = {"reason": column.reason, **remarks, "planned": column.planned}
    return {
        "title": column.title,
        "environment": environment,
        "dates": column.dates,
        **told,
        "runs": [asdict(run) for run in column.runs],
    }


def _row(row: Row) -> dict[str, Any]:
    return {"op": row.op, "against": row.against, "cells": [_plain(cell) for cell in row.cells]}


def _plain(cell: Cell) -> dict[str, Any]:
    headroom = cell.headroom if cell.headroom is None or math.isfinite(cell.headroom) else str(cell.headroom)
    verdicts = _by_word(cell.counts)
    worst = {"headroom": headroom, "headroom_case": cell.headroom_case, "dates": cell.dates}
    counts = {"planned": cell.planned, "verdicts": verdicts, "shrunk": cell.shrunk}
    return {"text": cell.text, "colour": cell.colour, **counts, **worst}


def _difference(difference: Difference) -> dict[str, Any]:
    sides = [{**asdict(side), "verdict": side.verdict.value} for side in difference.sides]
    return {**asdict(difference), "sides": sides}


def _by_word(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {verdict.value: count for verdict, count in counts.items()}

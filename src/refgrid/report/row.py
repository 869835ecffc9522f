"""Rows of the matrix: ops and what they are held against, and definitions, over the cells of all columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refgrid.records.record import Verdict
from refgrid.report.cell import NOT_PLANNED, NOT_RUN, WORST_FIRST, Cell, total
from refgrid.report.column import Column

_RANK: Mapping[str, int] = {"red": 0, "yellow": 1, "green": 2}


@dataclass(frozen=True)
class Row:
    """One op held against one thing; `against` is None for the op as a whole, which sums its parts."""

    op: str
    against: str | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class DefinitionRow:
    """One definition, or its twin: `twin` says then how its constants differ."""

    op_type: str
    definition: str
    twin: str
    cells: tuple[Cell, ...]


def rows(columns: Sequence[Column]) -> tuple[Row, ...]:
    """Every op that a case is of, worst first, each followed by its parts, worst first."""
    parts = dict.fromkeys(part for column in columns for part in column.parts)
    below: dict[str, list[Row]] = {}
    for part in parts:
        cells = tuple(column.parts.get(part) or _blank(column) for column in columns)
        below.setdefault(part[0], []).append(Row(*part, cells))
    totals = sorted((_total(op, below[op]) for op in below), key=_worst_first)
    return tuple(row for op in totals for row in (op, *sorted(below[op.op], key=_worst_first)))


def definition_rows(columns: Sequence[Column], published: Mapping[str, str]) -> tuple[DefinitionRow, ...]:
    """Every definition that a case is of or that is `published`, by op_type and name, each followed by its twin.

    `published` maps names to op_types: what nobody planned to prove has a row that says so.
    """
    planned = {each for column in columns for each in column.planned_definitions}
    found = []
    for op_type, name, twin in sorted(planned | {(op_type, name, "") for name, op_type in published.items()}):
        cells = tuple(column.definitions.get((name, twin)) or _blank(column) for column in columns)
        found.append(DefinitionRow(op_type, name, twin, cells))
    return tuple(found)


def _blank(column: Column) -> Cell:
    """What was not planned; of a column without records, that it was not run, or cannot be resolved any more."""
    if column.environment:
        return Cell(absent=NOT_PLANNED)
    verdict = column.reason.partition(":")[0]
    return Cell(absent=verdict if verdict == Verdict.UNRESOLVABLE.value else NOT_RUN)


def _total(op: str, parts: Sequence[Row]) -> Row:
    cells = []
    for in_column in zip(*(row.cells for row in parts), strict=True):
        worst = max(in_column, key=lambda cell: -1 if cell.headroom is None else cell.headroom)
        dates = sorted(date for cell in in_column for date in cell.dates or ())
        days = (dates[0], dates[-1]) if dates else None
        shrunk = sum(cell.shrunk for cell in in_column)
        cells.append(Cell(total(in_column), worst.headroom, worst.headroom_case, days, worst.absent, shrunk))
    return Row(op, None, tuple(cells))


def _worst_first(row: Row) -> tuple[int, int, int, str]:
    """By colour, then by the worst verdict and how often it came; columns without records do not count."""
    cells = [cell for cell in row.cells if cell.planned or cell.absent == NOT_PLANNED]
    counts = total(cells)
    worst = next(iter(counts), Verdict.MATCH)
    rank = min((_RANK[cell.colour] for cell in cells), default=1)
    return rank, WORST_FIRST[worst], -counts.get(worst, 0), row.against or row.op

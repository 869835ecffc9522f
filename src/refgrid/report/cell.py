"""Cells and rows of the matrix: what became of the cases of one op in one column, counted by verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from refgrid.dataset.case import Case
from refgrid.records.record import Outcome, Verdict, verdict_counts
from refgrid.report.column import Column, Standing, span

Colour = Literal["green", "yellow", "red"]
_RANK: Mapping[str, int] = {"red": 0, "yellow": 1, "green": 2}
WORST_FIRST: Mapping[Verdict, int] = {verdict: rank for rank, verdict in enumerate(Verdict)}


@dataclass(frozen=True)
class Cell:
    """What became of the cases of one row in one column.

    `headroom` is the largest error divided by what was allowed there, `headroom_case` the case that has it; `shrunk`
    counts the cases whose sizes were cut to fit into memory;
    `absent` is what a cell without cases says.
    """

    counts: Mapping[Verdict, int] = field(default_factory=dict)
    headroom: float | None = None
    headroom_case: str = ""
    dates: tuple[str, str] | None = None
    absent: str = "not planned"
    shrunk: int = 0

    @property
    def colour(self) -> Colour:
        """red: something is wrong. green: all that was planned is proven. yellow: the rest, a blank too."""
        found = {verdict.colour for verdict in self.counts}
        return "red" if "red" in found else "green" if found == {"green"} else "yellow"

    @property
    def planned(self) -> int:
        """How many cases the cell accounts for."""
        return sum(self.counts.values())

    @property
    def text(self) -> str:
        """The counts in words, worst first, such as "3 mismatch, 409 match"."""
        return told(self.counts) or self.absent


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
    cases = [entry.outcome.case for column in columns for entry in column.outcomes]
    parts = dict.fromkeys((case.op, against(case)) for case in cases)
    sorted_in = [_by_part(column) for column in columns]
    below: dict[str, list[Row]] = {}
    for part in parts:
        cells = tuple(_cell(c, entries.get(part, [])) for c, entries in zip(columns, sorted_in, strict=True))
        below.setdefault(part[0], []).append(Row(*part, cells))
    totals = sorted((_total(op, below[op]) for op in below), key=_worst_first)
    return tuple(row for op in totals for row in (op, *sorted(below[op.op], key=_worst_first)))


def definition_rows(columns: Sequence[Column], published: Mapping[str, str]) -> tuple[DefinitionRow, ...]:
    """Every definition that a case is of or that is `published`, by op_type and name, each followed by its twin.

    `published` maps names to op_types: what nobody planned to prove has a row that says so.
    """
    cases = [entry.outcome.case for column in columns for entry in column.outcomes]
    planned = {(case.op_type, case.definition, case.twin) for case in cases}
    names = sorted(planned | {(op_type, name, "") for name, op_type in published.items()})
    sorted_in = [_by_definition(column) for column in columns]
    found = []
    for op_type, name, twin in names:
        cells = tuple(_cell(c, entries.get((name, twin), [])) for c, entries in zip(columns, sorted_in, strict=True))
        found.append(DefinitionRow(op_type, name, twin, cells))
    return tuple(found)


def _by_definition(column: Column) -> dict[tuple[str, str], list[Standing]]:
    found: dict[tuple[str, str], list[Standing]] = {}
    for entry in column.outcomes:
        found.setdefault((entry.outcome.case.definition, entry.outcome.case.twin), []).append(entry)
    return found


def against(case: Case) -> str:
    """What a case holds its op against, as a row is called."""
    if case.check in ("shape", "dtype", "determinism"):
        return "itself"
    return case.source or ("ground truth" if case.check == "numerics" else case.check)


def _by_part(column: Column) -> dict[tuple[str, str], list[Standing]]:
    found: dict[tuple[str, str], list[Standing]] = {}
    for entry in column.outcomes:
        found.setdefault((entry.outcome.case.op, against(entry.outcome.case)), []).append(entry)
    return found


def _cell(column: Column, entries: Sequence[Standing]) -> Cell:
    outcomes = [entry.outcome for entry in entries]
    headroom, case = max(_headrooms(outcomes), default=(None, ""))
    absent = "not planned" if column.environment else "not run"
    shrunk = sum(1 for outcome in outcomes if outcome.shrunk)
    return Cell(verdict_counts(outcomes), headroom, case, span(entries), absent, shrunk)


def _headrooms(outcomes: Iterable[Outcome]) -> Iterator[tuple[float, str]]:
    """Records write non-finite numbers as words; an error that is no number has used up everything."""
    for outcome in outcomes:
        for comparison in outcome.comparisons:
            if comparison.get("headroom") is not None:
                value = float(comparison["headroom"])
                yield math.inf if math.isnan(value) else value, outcome.case.id


def _total(op: str, parts: Sequence[Row]) -> Row:
    cells = []
    for in_column in zip(*(row.cells for row in parts), strict=True):
        worst = max(in_column, key=lambda cell: -1 if cell.headroom is None else cell.headroom)
        dates = sorted(date for cell in in_column for date in cell.dates or ())
        days = (dates[0], dates[-1]) if dates else None
        shrunk = sum(cell.shrunk for cell in in_column)
        cells.append(Cell(total(in_column), worst.headroom, worst.headroom_case, days, worst.absent, shrunk))
    return Row(op, None, tuple(cells))


def total(cells: Iterable[Cell]) -> dict[Verdict, int]:
    """Counts of all cells together, worst verdict first."""
    counts: Counter[Verdict] = Counter()
    for cell in cells:
        counts.update(cell.counts)
    return {verdict: counts[verdict] for verdict in Verdict if counts[verdict]}


def _worst_first(row: Row) -> tuple[int, int, int, str]:
    """By colour, then by the worst verdict and how often it came; columns without records do not count."""
    cells = [cell for cell in row.cells if cell.absent != "not run"]
    counts = total(cells)
    worst = next(iter(counts), Verdict.MATCH)
    rank = min((_RANK[cell.colour] for cell in cells), default=1)
    return rank, WORST_FIRST[worst], -counts.get(worst, 0), row.against or row.op


def told(counts: Mapping[Verdict, int]) -> str:
    """The counts in words, such as "3 mismatch, 409 match"; empty for none."""
    return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())

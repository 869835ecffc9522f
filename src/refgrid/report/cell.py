"""Cells of the matrix: what became of the cases of one row in one column, counted by verdict."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from refgrid.dataset.case import Case
from refgrid.records.record import Outcome, Verdict, verdict_counts
from refgrid.report.standing import Standing, span

Colour = Literal["green", "yellow", "red"]
_Row = TypeVar("_Row", bound=Hashable)
NOT_PLANNED, NOT_RUN = "not planned", "not run"
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
    absent: str = NOT_PLANNED
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


def cells(standing: Iterable[Standing], row_of: Callable[[Case], _Row]) -> dict[_Row, Cell]:
    """A cell for each row that a case is of, in the order of the cases."""
    entries: dict[_Row, list[Standing]] = defaultdict(list)
    for entry in standing:
        entries[row_of(entry.outcome.case)].append(entry)
    return {row: _cell(same) for row, same in entries.items()}


def against(case: Case) -> str:
    """What a case holds its op against, as a row is called."""
    if case.check in ("shape", "dtype", "determinism"):
        return "itself"
    return case.source or ("ground truth" if case.check == "numerics" else case.check)


def _cell(entries: Sequence[Standing]) -> Cell:
    outcomes = [entry.outcome for entry in entries]
    headroom, case = max(_headrooms(outcomes), default=(None, ""))
    shrunk = sum(1 for outcome in outcomes if outcome.shrunk)
    return Cell(verdict_counts(outcomes), headroom, case, span(entries), shrunk=shrunk)


def _headrooms(outcomes: Iterable[Outcome]) -> Iterator[tuple[float, str]]:
    """Records write non-finite numbers as words; an error that is no number has used up everything."""
    for outcome in outcomes:
        for comparison in outcome.comparisons:
            if comparison.get("headroom") is not None:
                value = float(comparison["headroom"])
                yield math.inf if math.isnan(value) else value, outcome.case.id


def total(cells: Iterable[Cell]) -> dict[Verdict, int]:
    """Counts of all cells together, worst verdict first."""
    counts: Counter[Verdict] = Counter()
    for cell in cells:
        counts.update(cell.counts)
    return {verdict: counts[verdict] for verdict in Verdict if counts[verdict]}


def told(counts: Mapping[Verdict, int]) -> str:
    """The counts in words, such as "3 mismatch, 409 match"; empty for none."""
    return ", ".join(f"{count} {verdict.value}" for verdict, count in counts.items())

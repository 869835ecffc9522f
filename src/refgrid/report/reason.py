"""Why cells have their colour: equal reasons together, worst first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from refgrid.records.record import Outcome, Verdict
from refgrid.report.cell import WORST_FIRST, against
from refgrid.report.standing import History


@dataclass(frozen=True)
class Reason:
    """Equal reasons of one column, thing held against and verdict; `text` is that of the example case."""

    column: str
    against: str
    verdict: Verdict
    text: str
    count: int
    example: str


def reasons(history: History) -> tuple[Reason, ...]:
    """One entry for outcomes whose reasons differ in numbers only.

    A match, cached or not, is listed if it says something.
    """
    groups: dict[tuple[str, Verdict, str], list[Outcome]] = {}
    for outcome in (entry.outcome for entry in history.standing):
        if outcome.reason or outcome.verdict not in (Verdict.MATCH, Verdict.CACHED):
            key = (against(outcome.case), outcome.verdict, without_numbers(outcome.reason))
            groups.setdefault(key, []).append(outcome)
    return tuple(
        Reason(history.title, source, verdict, same[0].reason or "no reason was given", len(same), same[0].case.id)
        for (source, verdict, _), same in groups.items()
    )


def worst_first(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    """Those of all columns by verdict, then by how often they came."""
    return tuple(sorted(reasons, key=lambda reason: (WORST_FIRST[reason.verdict], -reason.count)))


@cache  # thousands of outcomes end in the same words
def without_numbers(text: str) -> str:
    """The text with each number, and each list of numbers, as one `#`; names of dtypes keep theirs."""
    text = re.sub(r"(?<!\d)(?<!float)(?<!int)\d+(\.\d+)?(e[+-]?\d+)?", "#", text)
    return re.sub(r"-?#(, -?#)*", "#", text)

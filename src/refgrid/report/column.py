"""Columns of the matrix: all that it shows of one environment on one kind of machine, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from refgrid.environments.measured import Environment
from refgrid.records.record import Outcome, Verdict
from refgrid.report.cell import Cell, against, cells
from refgrid.report.reason import Reason, reasons
from refgrid.report.standing import History, Standing, span


@dataclass(frozen=True)
class RunRow:
    """One run of a column, and how many of its outcomes stand."""

    run: str
    started: str
    refgrid: str
    file: str
    finished: bool
    planned: int
    standing: int
    environment: Environment


@dataclass(frozen=True)
class Ending:
    """A way in which cases of an op, held against one thing, ended: `headline` is the reason without what varies."""

    op: str
    against: str
    verdict: Verdict
    headline: str


@dataclass(frozen=True)
class Column:
    """One environment on one kind of machine, as the newest run with a result measured it.

    `planned` counts the cases that the headers of the runs owe, whatever became of them. `notes` say where older
    outcomes stand, `findings` what is odd about where the newest run ran. `parts` are cells by op and what it is held
    against, `definitions` by name and twin, `planned_definitions` have their op_types; `ended` says of each case that
    ran by number in which of the `endings`. A column without records has no environment and says in `reason` why.
    """

    title: str
    environment: Environment | None = None
    dates: tuple[str, str] | None = None
    runs: tuple[RunRow, ...] = ()
    planned: int = 0
    notes: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()
    reason: str = ""
    parts: Mapping[tuple[str, str], Cell] = field(default_factory=dict)
    definitions: Mapping[tuple[str, str], Cell] = field(default_factory=dict)
    planned_definitions: tuple[tuple[str, str, str], ...] = ()
    reasons: tuple[Reason, ...] = ()
    endings: tuple[Ending, ...] = ()
    ended: Mapping[str, int] = field(default_factory=dict)


def columns(histories: Iterable[History]) -> list[Column]:
    """A column each."""
    return [_column(history) for history in histories]


def _column(history: History) -> Column:
    """What the matrix shows of a history."""
    cases = [entry.outcome.case for entry in history.standing]
    endings: dict[Ending, int] = {}
    ended = dict(_ended(history.standing, endings))
    return Column(
        history.title,
        history.environment,
        dates=span(history.standing),
        runs=tuple(_rows(history)),
        planned=history.planned,
        notes=history.notes,
        findings=history.findings,
        parts=cells(history.standing, lambda case: (case.op, against(case))),
        definitions=cells(history.standing, lambda case: (case.definition, case.twin)),
        planned_definitions=tuple(dict.fromkeys((case.op_type, case.definition, case.twin) for case in cases)),
        reasons=reasons(history),
        endings=tuple(endings),
        ended=ended,
    )


def _rows(history: History) -> Iterator[RunRow]:
    stand = Counter(entry.run.header.run for entry in history.standing)
    for run in history.runs:
        head = run.header
        told = (run.file.as_posix(), run.finished, len(head.planned), stand[head.run], head.environment)
        yield RunRow(head.run, head.started, head.refgrid, *told)


def _ended(standing: Iterable[Standing], endings: dict[Ending, int]) -> Iterator[tuple[str, int]]:
    """Cases that ran with the numbers of their endings, which are added where they are new."""
    for outcome in (entry.outcome for entry in standing):
        if outcome.verdict is not Verdict.NOT_RUN:
            ending = Ending(outcome.case.op, against(outcome.case), outcome.verdict, _headline(outcome))
            yield outcome.case.id, endings.setdefault(ending, len(endings))


def _headline(outcome: Outcome) -> str:
    """The reason; of an expected failure why it is expected, with its link, and not what was found this time."""
    expected, known, _ = outcome.reason.partition("): ")
    return f"{expected})" if known and outcome.verdict is Verdict.EXPECTED else outcome.reason

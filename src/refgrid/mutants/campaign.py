"""One run of the command: which mutants are due, and a report that is kept whenever a definition is done."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from refgrid.dataset.case import Size
from refgrid.dataset.definition import load_dataset
from refgrid.mutants.baseline import CHECKS
from refgrid.mutants.kept import keep, read, settled
from refgrid.mutants.parts import Parts
from refgrid.mutants.report import Report, Row, Run, false_alarms, rows, unsound
from refgrid.mutants.running import Task, Told, chosen, demand_plantable, run, self_tests, tasks
from refgrid.mutants.table import load_mutants
from refgrid.sources import Sources


@dataclass(frozen=True)
class Asked:
    """What the command was asked for; `environment` are the versions that it runs with."""

    root: Path
    only: Sequence[str]
    sizes: tuple[Size, ...]
    device: str
    output: Path | None
    environment: Mapping[str, str]
    again: bool = False
    most: int | None = None


class Campaign:
    """The mutants that were asked for, and of them what has to be planted."""

    def __init__(self, asked: Asked) -> None:
        """Raises MutantError for what cannot be planted, and for a report that cannot be added to."""
        self._asked, self._table = asked, load_mutants(asked.root / "mutants")
        here, elsewhere = chosen(asked.root, asked.only, asked.device)
        self._here, self._elsewhere = here, tuple(elsewhere)
        self._data = load_dataset(asked.root)
        demand_plantable(self._data, [*here, *elsewhere])
        self._parts = Parts(self._data, Sources()).of
        self.todo = tasks(asked.root, self._data, here, asked.sizes, asked.device, self._settled(), asked.most)

    def run(self, processes: int, limit: int, tell: Callable[[Task], object]) -> Report:
        """Plant what is due and tell of each workload; returns what is known of all that was asked for."""
        started = datetime.now(timezone.utc).isoformat(timespec="seconds")
        due = {mutant.id for task in self.todo for mutant in task.mutants}
        tested = self_tests(self._data, [mutant for mutant in self._here if mutant.id in due], processes, limit)
        report, told, left = self._report([], tested, started), list[tuple[Task, Told]](), Counter(map(_of, self.todo))
        for task, found in run(self.todo, processes, limit):
            tell(task)
            told.append((task, found))
            left[_of(task)] -= 1
            if not left[_of(task)]:
                report = self._report([each for each in told if not left[_of(each[0])]], tested, started)
        return report

    def restate(self) -> Report:
        """What is kept of all that was asked for, as the table and the code are today; plants nothing."""
        return self._report([], {}, "")

    def _settled(self) -> set[tuple[str, Size]]:
        asked = self._asked
        if asked.output is None or asked.again:
            return set()
        return settled(read(asked.output, self._table, CHECKS), asked.device, asked.environment, self._parts)

    def _report(self, told: Sequence[tuple[Task, Told]], tested: Mapping[str, str], started: str) -> Report:
        """What was found; where it is kept, with what was known before of the mutants that were asked for."""
        asked = self._asked
        where = (started, asked.device, asked.sizes, asked.environment)
        found = rows(self._here, told, tested, Run(*where, false_alarms(told, CHECKS), unsound(told)))
        new = Report(tuple(self._with_parts(found)), self._elsewhere, CHECKS)
        if asked.output is None:
            return new
        keep(new, asked.output, self._table, self._parts)
        return self._of_those_asked_for(read(asked.output, self._table, CHECKS))

    def _with_parts(self, found: Sequence[Row]) -> Iterator[Row]:
        yield from (replace(row, parts=self._parts(row.mutant, *row.column)) for row in found)

    def _of_those_asked_for(self, kept: Report) -> Report:
        ids = {mutant.id for mutant in self._here}
        columns = [(self._asked.device, size) for size in self._asked.sizes]
        found = tuple(row for row in kept.rows if row.mutant.id in ids and row.column in columns)
        return replace(kept, rows=found, elsewhere=self._elsewhere, waiting=(), older={}, outdated=())


def _of(task: Task) -> tuple[str, bool, Size]:
    """What is kept at once: a definition at one size."""
    return task.place.definition, task.place.twin, task.size

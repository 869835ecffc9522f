"""Where environments on one kind of machine differ: equal differences of one op and source together, one line each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refgrid.records.record import Outcome, Verdict
from refgrid.report.cell import WORST_FIRST, against
from refgrid.report.column import Column
from refgrid.report.reason import without_numbers


@dataclass(frozen=True)
class Side:
    """The columns in which cases ended alike, and how: `reason` is that of the example case."""

    columns: tuple[str, ...]
    verdict: Verdict
    reason: str

    @property
    def without_numbers(self) -> tuple[str, Verdict, str]:
        """What equal sides of two cases have in common."""
        return " ".join(self.columns), self.verdict, without_numbers(self.reason)

    @property
    def told(self) -> str:
        """In words, such as "match in a and b" or "missing in c: not installed"."""
        reason = f": {self.reason}" if self.reason and self.verdict is not Verdict.MATCH else ""
        return f"{self.verdict.value} in {' and '.join(self.columns)}{reason}"


_Alike = tuple[str, str, tuple[tuple[str, Verdict, str], ...]]  # op, held against, its sides


@dataclass(frozen=True)
class Difference:
    """`count` cases of one op against one source that ended in the same two or more ways; worst side last."""

    machine: str
    op: str
    against: str
    count: int
    sides: tuple[Side, ...]
    example: str


def differences(columns: Sequence[Column]) -> tuple[Difference, ...]:
    """Every difference in verdict between columns of one kind of machine, most cases first within an op.

    A case that a column did not plan, or did not run, says nothing there. `cached` counts as the `match` it is.
    """
    machines: dict[str, list[Column]] = defaultdict(list)
    for column in columns:
        if column.environment is not None:
            machines[column.environment.gpu or "CPU"].append(column)
    found = [each for machine, same in machines.items() for each in _of_machine(machine, same)]
    return tuple(sorted(found, key=lambda each: (each.machine, each.op, each.against, -each.count)))


def _of_machine(machine: str, columns: Sequence[Column]) -> Iterator[Difference]:
    groups: dict[_Alike, list[tuple[str, tuple[Side, ...]]]] = defaultdict(list)
    for case_id, ended in _by_case(columns).items():
        if len(sides := _sides(ended)) > 1:
            case = next(iter(ended.values())).case
            groups[case.op, against(case), tuple(side.without_numbers for side in sides)].append((case_id, sides))
    for (op, source, _), same in groups.items():
        example, sides = same[0]
        yield Difference(machine, op, source, len(same), sides, example)


def _by_case(columns: Sequence[Column]) -> dict[str, dict[str, Outcome]]:
    """How each case ended, by the environment's name."""
    found: dict[str, dict[str, Outcome]] = defaultdict(dict)
    for column in columns:
        assert column.environment is not None
        for entry in column.outcomes:
            if entry.outcome.verdict is not Verdict.NOT_RUN:
                found[entry.outcome.case.id][column.environment.name] = entry.outcome
    return found


def _sides(ended: dict[str, Outcome]) -> tuple[Side, ...]:
    """Columns of one verdict together, whatever their words; the best verdict first."""
    alike: dict[Verdict, list[tuple[str, Outcome]]] = defaultdict(list)
    for name, outcome in ended.items():
        verdict = Verdict.MATCH if outcome.verdict is Verdict.CACHED else outcome.verdict
        alike[verdict].append((name, outcome))
    ordered = sorted(alike, key=lambda verdict: -WORST_FIRST[verdict])
    return tuple(Side(tuple(name for name, _ in alike[v]), v, alike[v][0][1].reason) for v in ordered)

"""Where environments on one kind of machine differ: equal differences against one source together, one line each.

What an environment lacks is a difference of its own: were it part of the others, each would be told once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refgrid.dataset.case import Case
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


_OPS_TOLD = 4
_Alike = tuple[str, tuple[tuple[str, Verdict, str], ...]]  # held against, its sides


@dataclass(frozen=True)
class Difference:
    """`count` cases of some ops against one source that ended in the same two or more ways; worst side last.

    One side alone is that of environments which miss the source that others have.
    """

    machine: str
    ops: tuple[str, ...]
    against: str
    count: int
    sides: tuple[Side, ...]
    example: str

    @property
    def told(self) -> str:
        """How they ended, the worst last."""
        return "; ".join(side.told for side in self.sides)

    @property
    def where(self) -> str:
        """Its ops, the first by name."""
        more = f" and {len(self.ops) - _OPS_TOLD} more ops" if len(self.ops) > _OPS_TOLD else ""
        return ", ".join(self.ops[:_OPS_TOLD]) + more


def differences(columns: Sequence[Column]) -> tuple[Difference, ...]:
    """Every difference in verdict between columns of one kind of machine, most cases first within a source.

    A case that a column did not plan, or did not run, says nothing there. `cached` counts as the `match` it is.
    """
    machines: dict[str, list[Column]] = defaultdict(list)
    for column in columns:
        if column.environment is not None:
            machines[column.environment.gpu or "CPU"].append(column)
    found = [each for machine, same in machines.items() for each in _of_machine(machine, same)]
    return tuple(sorted(found, key=lambda each: (each.machine, each.against, -each.count)))


def _of_machine(machine: str, columns: Sequence[Column]) -> Iterator[Difference]:
    groups: dict[_Alike, list[tuple[Case, tuple[Side, ...]]]] = defaultdict(list)
    for ended in _by_case(columns).values():
        case = next(iter(ended.values())).case
        for sides in _parts(_sides(ended)):
            groups[against(case), tuple(side.without_numbers for side in sides)].append((case, sides))
    for (source, _), same in groups.items():
        example, sides = same[0]
        ops = tuple(sorted({case.op for case, _ in same}))
        yield Difference(machine, ops, source, len(same), sides, example.id)


def _parts(sides: tuple[Side, ...]) -> Iterator[tuple[Side, ...]]:
    """The side that misses the source, and the others if they differ among themselves."""
    missing = tuple(side for side in sides if side.verdict is Verdict.MISSING)
    there = tuple(side for side in sides if side not in missing)
    if missing and there:
        yield missing
    if len(there) > 1:
        yield there


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
    return tuple(Side(tuple(name for name, _ in alike[v]), v, _headline(alike[v][0][1])) for v in ordered)


def _headline(outcome: Outcome) -> str:
    """The reason; of an expected failure why it is expected, with its link, and not what was found this time."""
    expected, known, _ = outcome.reason.partition("): ")
    return f"{expected})" if known and outcome.verdict is Verdict.EXPECTED else outcome.reason

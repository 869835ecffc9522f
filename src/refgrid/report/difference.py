"""Where environments on one kind of machine differ: equal differences against one source together, one line each.

What an environment lacks is a difference of its own: were it part of the others, each would be told once more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from refgrid.records.record import Verdict
from refgrid.report.cell import WORST_FIRST
from refgrid.report.column import Column, Ending
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
_Ended = tuple[tuple[str, Ending], ...]  # how a case ended, by the environment's name
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
            machines[column.environment.machine].append(column)
    found = [each for machine, same in machines.items() for each in _of_machine(machine, same)]
    return tuple(sorted(found, key=lambda each: (each.machine, each.against, -each.count)))


def _of_machine(machine: str, columns: Sequence[Column]) -> Iterator[Difference]:
    groups: dict[_Alike, list[tuple[_Ended, tuple[Side, ...], list[str]]]] = defaultdict(list)
    for ended, cases in _alike(columns).items():
        for sides in _parts(_sides(ended)):
            source = ended[0][1].against
            groups[source, tuple(side.without_numbers for side in sides)].append((ended, sides, cases))
    for (source, _), same in groups.items():
        _, sides, cases = same[0]
        ops = tuple(sorted({ended[0][1].op for ended, *_ in same}))
        yield Difference(machine, ops, source, sum(len(cases) for *_, cases in same), sides, cases[0])


def _parts(sides: tuple[Side, ...]) -> Iterator[tuple[Side, ...]]:
    """The side that misses the source, and the others if they differ among themselves."""
    missing = tuple(side for side in sides if side.verdict is Verdict.MISSING)
    there = tuple(side for side in sides if side not in missing)
    if missing and there:
        yield missing
    if len(there) > 1:
        yield there


def _alike(columns: Sequence[Column]) -> dict[_Ended, list[str]]:
    """Cases by how they ended: of many thousands, few end in a way of their own."""
    numbers: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
    for place, column in enumerate(columns):
        assert column.environment is not None
        for case, number in column.ended.items():
            numbers[case][column.environment.name] = place, number
    found: dict[tuple[tuple[str, tuple[int, int]], ...], list[str]] = defaultdict(list)
    for case, by_name in numbers.items():
        found[tuple(by_name.items())].append(case)
    return {_ended(columns, told): cases for told, cases in found.items()}


def _ended(columns: Sequence[Column], told: tuple[tuple[str, tuple[int, int]], ...]) -> _Ended:
    return tuple((name, columns[place].endings[number]) for name, (place, number) in told)


def _sides(ended: _Ended) -> tuple[Side, ...]:
    """Columns of one verdict together, whatever their words; the best verdict first."""
    alike: dict[Verdict, list[tuple[str, Ending]]] = defaultdict(list)
    for name, ending in ended:
        verdict = Verdict.MATCH if ending.verdict is Verdict.CACHED else ending.verdict
        alike[verdict].append((name, ending))
    ordered = sorted(alike, key=lambda verdict: -WORST_FIRST[verdict])
    return tuple(Side(tuple(name for name, _ in alike[v]), v, alike[v][0][1].headline) for v in ordered)

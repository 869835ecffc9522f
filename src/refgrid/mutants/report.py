"""What became of every mutant: a row for each mutant, device and size, a column of them for each device and size."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from refgrid.dataset.case import SIZES, Size
from refgrid.mutants.table import Mutant

if TYPE_CHECKING:
    from refgrid.mutants.running import Task, Told

# Of what became of a mutant at several workloads, the first of these is what became of the mutant.
WORST_FIRST = ("caught", "survived", "rounding", "same", "not-run")
_HELD = ("caught", "survived")  # what could be caught
_MISSED = ("survived", "unmoved")

# What a verdict followed from, as `Parts.of` gives it. Where one of the first is another, it is about code that is no
# longer there; where one of the others is, the next run plants again, and until then the report counts them.
DECIDING = ("reference", "adapter")
PARTS = (*DECIDING, "definition", "workloads", "tolerance", "instrument")

# Where the documents' checks run. What they miss is known there, and at larger sizes they cost more than all else.
DOCUMENTS_SIZE: Size = "small"


@dataclass(frozen=True)
class Run:
    """When, where and at which workloads mutants were judged, and what the sound code did there.

    `false_alarms`: by the documents' checks, at how many workloads each is red for the sound code, and of how many.
    `unsound`: where the suite's own checks are red for it, so that no mutant was held to them.
    """

    date: str
    device: str
    sizes: tuple[Size, ...]
    environment: Mapping[str, str]
    false_alarms: Mapping[str, tuple[int, int]]
    unsound: tuple[str, ...] = ()

    @property
    def documents(self) -> bool:
        """Whether the documents' checks ran there."""
        return DOCUMENTS_SIZE in self.sizes


@dataclass(frozen=True)
class Row:
    """One mutant at the workloads of one size: what became of it, and what its provider's self-test says of an adapter.

    `judged` holds judgements as plain data; `fixed` says which of the documents' checks are red at some workload, and
    green for the sound code there. `parts` are digests of what the verdict followed from.
    """

    mutant: Mutant
    size: Size
    judged: tuple[Mapping[str, Any], ...]
    fixed: Mapping[str, bool]
    self_test: str
    run: Run
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def column(self) -> tuple[str, Size]:
        """Device and size."""
        return self.run.device, self.size

    @property
    def key(self) -> tuple[str, str, Size]:
        """There is one row of each."""
        return self.mutant.id, *self.column

    @property
    def fate(self) -> str:
        """caught, survived, unmoved, equivalent, not-run, or seen: listed as equivalent and yet caught.

        Caught is what turns a case red at one workload of the size at least. Unmoved is what moves no result there by
        more than a rounding, of a size beyond the smallest, which is the one that every fault has to be seen at.
        """
        found = next((fate for fate in WORST_FIRST if any(one["fate"] == fate for one in self.judged)), "not-run")
        if self.mutant.equivalent and found != "not-run":
            return "seen" if found in _HELD else "equivalent"
        if found == "not-run":
            return found
        if found == "caught" or self.self_test:
            return "caught"
        return "survived" if found == "survived" or self.size == SIZES[0] else "unmoved"

    @property
    def told(self) -> str:
        """Sums of the judgements: 5 mismatch, 1 same."""
        return ", ".join(f"{count} {word}" for word, count in Counter(map(_word, self.judged)).most_common())

    @property
    def reason(self) -> str:
        """Why it is equivalent, or what was said where it was caught first, or how it was not."""
        if self.mutant.equivalent:
            return self.mutant.equivalent
        told = sorted(self.judged, key=lambda one: (WORST_FIRST.index(one["fate"]), len(one["reason"])))
        return next((one["reason"] for one in told if one["reason"]), self.self_test)


@dataclass(frozen=True)
class Column:
    """All rows of one device and size, and their sums; `checks` are those of the documents that ran there."""

    device: str
    size: Size
    rows: tuple[Row, ...]
    checks: tuple[str, ...]

    @property
    def name(self) -> str:
        """Device and size: cpu small."""
        return f"{self.device} {self.size}"

    @property
    def counts(self) -> Counter[str]:
        """Mutants by what became of them."""
        return Counter(row.fate for row in self.rows)

    @property
    def held(self) -> int:
        """Mutants that ran and are not equivalent: what could be caught."""
        return sum(row.fate in _HELD for row in self.rows)

    def fixed(self, check: str) -> int:
        """How many of these one of the documents' checks catches."""
        return sum(row.fate in _HELD and row.fixed.get(check, False) for row in self.rows)

    @property
    def cells(self) -> Counter[str]:
        """Judgements of mutants that are not equivalent, by what became of each."""
        return Counter(one["fate"] for row in self.rows if not row.mutant.equivalent for one in row.judged)

    @property
    def summary(self) -> str:
        """The gain in one line."""
        told = "; ".join(f"{check} {self.fixed(check)}" for check in self.checks)
        fixed = f"; fixed tolerances caught: {told}" if told else ""
        rest = {word: count for word, count in self.counts.items() if word not in _HELD}
        others = "".join(f", {count} {word}" for word, count in sorted(rest.items()))
        return f"{self.name}: caught {self.counts['caught']} of {self.held}{others}{fixed}"

    @property
    def families(self) -> dict[str, tuple[int, int, list[int]]]:
        """By op_type: caught, held, and what each of the documents' checks caught."""
        grouped: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.fate in _HELD:
                grouped[row.mutant.op_type].append(row)
        return {
            name: (
                sum(row.fate == "caught" for row in rows),
                len(rows),
                [sum(row.fixed.get(check, False) for row in rows) for check in self.checks],
            )
            for name, rows in grouped.items()
        }


@dataclass(frozen=True)
class Report:
    """All rows, of one run or of several, and the mutants that have none here.

    `elsewhere` need another device. `waiting` have not been judged since they are what they are. `older` counts the
    rows by each part that was another when they were judged; `outdated` names those of another reference or adapter.
    """

    rows: tuple[Row, ...]
    elsewhere: tuple[Mutant, ...]
    checks: tuple[str, ...]
    waiting: tuple[str, ...] = ()
    older: Mapping[str, int] = field(default_factory=dict)
    outdated: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """Those that the rows are of, by date."""
        found: list[Run] = []
        for row in self.rows:
            if row.run not in found:
                found.append(row.run)
        return tuple(sorted(found, key=lambda run: run.date))

    @property
    def columns(self) -> tuple[Column, ...]:
        """By device, then by size."""
        names = sorted({row.column for row in self.rows}, key=lambda each: (each[0], SIZES.index(each[1])))
        return tuple(self._column(*name) for name in names)

    def _column(self, device: str, size: Size) -> Column:
        rows = tuple(row for row in self.rows if row.column == (device, size))
        return Column(device, size, rows, self.checks if size == DOCUMENTS_SIZE else ())

    @property
    def by_mutant(self) -> dict[str, tuple[Row, ...]]:
        """The rows of each mutant, in the order of the columns."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in (row for column in self.columns for row in column.rows):
            found[row.mutant.id].append(row)
        return {row.mutant.id: tuple(found[row.mutant.id]) for row in self.rows}

    @property
    def failed(self) -> tuple[Row, ...]:
        """Mutants not caught at the smallest size at which they ran on a device; equivalent ones seen at any."""
        decided: dict[tuple[str, str], Row] = {}
        for row in (row for column in self.columns for row in column.rows if row.fate != "not-run"):
            decided.setdefault((row.mutant.id, row.run.device), row)
        return tuple(
            row
            for row in self.rows
            if row.fate == "seen" or (row.fate in _MISSED and decided[row.mutant.id, row.run.device] is row)
        )

    @property
    def exit_code(self) -> int:
        """1 when a mutant failed, 2 when none ran, else 0."""
        if self.failed:
            return 1
        return 0 if any(column.held for column in self.columns) else 2

    @property
    def summary(self) -> tuple[str, ...]:
        """A line a column, then the mutants that are in none, and the verdicts that are older than what they are of."""
        lines = [column.summary for column in self.columns] or ["nothing was planted"]
        if self.elsewhere:
            lines.append(f"{len(self.elsewhere)} for another device")
        if self.waiting:
            lines.append(f"{len(self.waiting)} not judged as they stand today, such as {self.waiting[0]!r}")
        lines += [f"{count} verdicts are of another {part} than today's" for part, count in self.older.items()]
        return tuple(lines)


def differing(before: Mapping[str, str], today: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the parts that are others today, or were not kept."""
    return tuple(name for name in PARTS if before.get(name) != today[name])


def plain(judgement: Any) -> dict[str, Any]:
    """A judgement as plain data; a change that has no size is the string inf."""
    data = asdict(judgement)
    change = data["change"]
    return {**data, "change": "inf" if change == float("inf") else float(f"{change:.3g}"), "fixed": dict(data["fixed"])}


def rows(
    mutants: Sequence[Mutant], told: Sequence[tuple[Task, Told]], self_tests: Mapping[str, str], run: Run
) -> tuple[Row, ...]:
    """A row for each mutant and size at which it was judged, from what each task found at its workload."""
    at: dict[tuple[str, Size], list[Told]] = defaultdict(list)
    for task, found in sorted(told, key=lambda each: each[0].workload):
        for name in found.judged:
            at[name, task.size].append(found)
    places = [(mutant, size) for mutant in mutants for size in run.sizes if (mutant.id, size) in at]
    return tuple(_row(mutant, size, at[mutant.id, size], self_tests, run) for mutant, size in places)


def _row(mutant: Mutant, size: Size, told: Sequence[Told], self_tests: Mapping[str, str], run: Run) -> Row:
    judged = tuple(plain(found.judged[mutant.id]) for found in told)
    alarms = [found.alarms[mutant.where.source] for found in told]
    pairs = list(zip(judged, alarms, strict=True))
    checks = run.false_alarms if size == DOCUMENTS_SIZE else ()
    fixed = {name: any(one["fixed"].get(name) and not false.get(name) for one, false in pairs) for name in checks}
    return Row(mutant, size, judged, fixed, self_tests.get(mutant.id, ""), run)


def false_alarms(told: Sequence[tuple[Task, Told]], checks: Sequence[str]) -> dict[str, tuple[int, int]]:
    """At how many workloads each of the documents' checks is red for the sound code, and of how many."""
    places = {
        (task.place.definition, source, task.workload): alarms
        for task, found in told
        for source, alarms in found.alarms.items()
    }
    red = {check: [alarms[check] for alarms in places.values() if check in alarms] for check in checks}
    return {check: (sum(each), len(each)) for check, each in red.items()}


def unsound(told: Sequence[tuple[Task, Told]]) -> tuple[str, ...]:
    """Where the sound code is red itself, held to what, and why: a line each."""
    lines = (
        f"{task.place.definition} {task.workload}, {source or check}: {why}"
        for task, found in told
        for (source, check), why in found.unsound.items()
    )
    return tuple(sorted(lines))


def _word(judgement: Mapping[str, Any]) -> str:
    return str(judgement["verdict"] or judgement["fate"])

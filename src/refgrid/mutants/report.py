"""What became of every mutant: rows by mutant, and the sums against the source documents."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from refgrid.mutants.table import Mutant

if TYPE_CHECKING:
    from refgrid.mutants.running import Task, Told

# Of what became of a mutant at several workloads, the first of these is what became of the mutant.
WORST_FIRST = ("caught", "survived", "rounding", "same", "not-run")


@dataclass(frozen=True)
class Run:
    """Where and at which workloads mutants were judged, and what the sound code did there.

    `false_alarms`: by the documents' checks, at how many workloads each is red for the sound code, and of how many.
    `unsound`: where the suite's own checks are red for it, so that no mutant was held to them.
    """

    device: str
    sizes: tuple[str, ...]
    environment: Mapping[str, str]
    false_alarms: Mapping[str, tuple[int, int]]
    unsound: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """One mutant: what became of it at each workload of a run, and what its provider's self-test says of an adapter.

    `judged` holds judgements as plain data; `fixed` says which of the documents' checks are red at some workload, and
    green for the sound code there.
    """

    mutant: Mutant
    judged: tuple[Mapping[str, Any], ...]
    fixed: Mapping[str, bool]
    self_test: str
    run: Run

    @property
    def fate(self) -> str:
        """caught, survived, equivalent, not-run, or seen: listed as equivalent and yet caught."""
        found = next((fate for fate in WORST_FIRST if any(one["fate"] == fate for one in self.judged)), "not-run")
        if self.mutant.equivalent and found != "not-run":
            return "seen" if found in ("caught", "survived") else "equivalent"
        if found == "not-run":
            return found
        return "caught" if found == "caught" or self.self_test else "survived"

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
class Report:
    """All rows, of one run or of several, and the mutants that need another device."""

    rows: tuple[Row, ...]
    elsewhere: tuple[Mutant, ...]
    checks: tuple[str, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Those that the rows are of."""
        found: list[Run] = []
        for row in self.rows:
            if row.run not in found:
                found.append(row.run)
        return tuple(found)

    @property
    def counts(self) -> Counter[str]:
        """Mutants by what became of them."""
        return Counter(row.fate for row in self.rows)

    @property
    def held(self) -> int:
        """Mutants that ran and are not equivalent: what could be caught."""
        return sum(row.fate in ("caught", "survived") for row in self.rows)

    def fixed(self, check: str) -> int:
        """How many of these one of the documents' checks catches."""
        return sum(row.fate in ("caught", "survived") and row.fixed.get(check, False) for row in self.rows)

    @property
    def cells(self) -> Counter[str]:
        """Judgements of mutants that are not equivalent, by what became of each."""
        return Counter(one["fate"] for row in self.rows if not row.mutant.equivalent for one in row.judged)

    @property
    def exit_code(self) -> int:
        """1 when a mutant survived or an equivalent one was seen, 2 when none ran, else 0."""
        if self.counts["survived"] or self.counts["seen"]:
            return 1
        return 0 if self.held else 2

    @property
    def summary(self) -> str:
        """The gain in one line."""
        told = "; ".join(f"{check} {self.fixed(check)}" for check in self.checks)
        rest = {word: count for word, count in self.counts.items() if word not in ("caught", "survived")}
        others = "".join(f", {count} {word}" for word, count in sorted(rest.items()))
        away = f", {len(self.elsewhere)} for another device" if self.elsewhere else ""
        return f"caught {self.counts['caught']} of {self.held}{others}{away}; fixed tolerances caught: {told}"

    @property
    def families(self) -> dict[str, tuple[int, int, list[int]]]:
        """By op_type: caught, held, and what each of the documents' checks caught."""
        grouped: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            if row.fate in ("caught", "survived"):
                grouped[row.mutant.op_type].append(row)
        return {
            name: (
                sum(row.fate == "caught" for row in rows),
                len(rows),
                [sum(row.fixed.get(check, False) for row in rows) for check in self.checks],
            )
            for name, rows in grouped.items()
        }


def plain(judgement: Any) -> dict[str, Any]:
    """A judgement as plain data; a change that has no size is the string inf."""
    data = asdict(judgement)
    change = data["change"]
    return {**data, "change": "inf" if change == float("inf") else float(f"{change:.3g}"), "fixed": dict(data["fixed"])}


def rows(
    mutants: Sequence[Mutant], told: Sequence[tuple[Task, Told]], self_tests: Mapping[str, str], run: Run
) -> tuple[Row, ...]:
    """A row for each mutant, from what each task found at its workload."""
    at: dict[str, list[Told]] = defaultdict(list)
    for _, found in sorted(told, key=lambda each: each[0].workload):
        for name in found.judged:
            at[name].append(found)
    return tuple(_row(mutant, at[mutant.id], self_tests.get(mutant.id, ""), run) for mutant in mutants)


def _row(mutant: Mutant, told: Sequence[Told], self_test: str, run: Run) -> Row:
    judged = tuple(plain(found.judged[mutant.id]) for found in told)
    alarms = [found.alarms[mutant.where.source] for found in told]
    pairs = list(zip(judged, alarms, strict=True))
    fixed = {
        name: any(one["fixed"].get(name) and not false.get(name) for one, false in pairs) for name in run.false_alarms
    }
    return Row(mutant, judged, fixed, self_test, run)


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

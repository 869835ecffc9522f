"""What became of every mutant: rows by mutant, the sums against the source documents, and the files that keep them."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from refgrid.mutants.table import Mutant
from refgrid.report.matrix import escaped, replace_file

# Of what became of a mutant at several workloads, the first of these is what became of the mutant.
WORST_FIRST = ("caught", "survived", "rounding", "same", "not-run")

_BY_LINE = ("mutants", "elsewhere")  # what of the data is a list of mutants


@dataclass(frozen=True)
class Row:
    """One mutant: what became of it at each workload, and what its provider's self-test says of a faulty adapter.

    `judged` holds judgements as plain data; `alarms` says for each workload which of the documents' checks are red for
    the sound code too, so that their red proves nothing.
    """

    mutant: Mutant
    judged: tuple[Mapping[str, Any], ...]
    alarms: Mapping[str, Mapping[str, bool]]
    self_test: str = ""

    @property
    def fate(self) -> str:
        """caught, survived, equivalent, not-run, or seen: listed as equivalent and yet caught."""
        found = next((fate for fate in WORST_FIRST if any(one["fate"] == fate for one in self.judged)), "not-run")
        if self.mutant.equivalent and found != "not-run":
            return "seen" if found in ("caught", "survived") else "equivalent"
        if found == "not-run":
            return found
        return "caught" if found == "caught" or self.self_test else "survived"

    def caught_by(self, check: str) -> bool:
        """Whether one of the documents' checks is red at some workload, and green for the sound code there."""
        return any(one["fixed"].get(check) and not self.alarms[one["workload"]].get(check) for one in self.judged)

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
    """All rows, the sizes and the device that they are of, and the mutants that need another device."""

    rows: tuple[Row, ...]
    elsewhere: tuple[Mutant, ...]
    checks: tuple[str, ...]
    sizes: tuple[str, ...]
    environment: Mapping[str, str]

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
        return sum(row.fate in ("caught", "survived") and row.caught_by(check) for row in self.rows)

    def alarms(self, check: str) -> tuple[int, int]:
        """At how many workloads the check is red for the sound code, and of how many."""
        places = {
            (row.mutant.where.definition, row.mutant.where.source, workload): alarms[check]
            for row in self.rows
            for workload, alarms in row.alarms.items()
            if check in alarms
        }
        return sum(places.values()), len(places)

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
                [sum(row.caught_by(check) for row in rows) for check in self.checks],
            )
            for name, rows in grouped.items()
        }


def to_dict(report: Report) -> dict[str, Any]:
    """Everything as plain data, for strict JSON."""
    return {
        "summary": report.summary,
        "exit_code": report.exit_code,
        "sizes": list(report.sizes),
        "environment": dict(report.environment),
        "counts": dict(report.counts),
        "cells": dict(report.cells),
        "fixed": {
            check: {"caught": report.fixed(check), "false_alarms": list(report.alarms(check))}
            for check in report.checks
        },
        "mutants": [_plain(row, report.checks) for row in report.rows],
        "elsewhere": [
            {"id": mutant.id, "digest": mutant.digest, "device": mutant.device} for mutant in report.elsewhere
        ],
    }


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write mutants.md and mutants.json, each whole or not at all; returns both. Raises OSError as the folder does."""
    folder.mkdir(parents=True, exist_ok=True)
    jinja = jinja2.Environment(loader=jinja2.PackageLoader("refgrid"), trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = escaped
    page = jinja.get_template("mutants.md.j2").render(report=report)
    texts = {"mutants.md": page, "mutants.json": to_json(to_dict(report))}
    return [replace_file(folder / name, text) for name, text in texts.items()]


def to_json(data: Mapping[str, Any]) -> str:
    """Strict JSON, one mutant a line: a change of one is one line of a diff."""
    head = {name: value for name, value in data.items() if name not in _BY_LINE}
    parts = [json.dumps(head, indent=1, allow_nan=False)[:-2]]
    for name in _BY_LINE:
        lines = ",\n".join(f"  {json.dumps(mutant, allow_nan=False)}" for mutant in data[name])
        parts.append(f' "{name}": [\n{lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def plain(judgement: Any) -> dict[str, Any]:
    """A judgement as plain data; a change that has no size is the string inf."""
    data = asdict(judgement)
    change = data["change"]
    return {**data, "change": "inf" if change == float("inf") else float(f"{change:.3g}"), "fixed": dict(data["fixed"])}


def rows(mutants: Sequence[Mutant], told: Iterable[tuple[str, Any]], self_tests: Mapping[str, str]) -> tuple[Row, ...]:
    """A row for each mutant, from what each task found at its workload."""
    judged: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    alarms: dict[str, dict[str, Mapping[str, bool]]] = defaultdict(dict)
    sources = {mutant.id: mutant.where.source for mutant in mutants}
    for workload, found in told:
        for name, judgement in found.judged.items():
            judged[name].append(plain(judgement))
            alarms[name][workload] = found.alarms[sources[name]]
    ordered = {name: tuple(sorted(each, key=lambda one: str(one["workload"]))) for name, each in judged.items()}
    return tuple(
        Row(mutant, ordered.get(mutant.id, ()), alarms[mutant.id], self_tests.get(mutant.id, "")) for mutant in mutants
    )


def _word(judgement: Mapping[str, Any]) -> str:
    return str(judgement["verdict"] or judgement["fate"])


def _plain(row: Row, checks: Sequence[str]) -> dict[str, Any]:
    place = row.mutant.where
    return {
        "id": row.mutant.id,
        "digest": row.mutant.digest,
        "definition": place.definition + ("~twin" if place.twin else ""),
        "planted_in": row.mutant.adapter or "reference",
        "fate": row.fate,
        "fixed": {check: row.caught_by(check) for check in checks},
        **({"equivalent": row.mutant.equivalent} if row.mutant.equivalent else {}),
        **({"self_test": row.self_test} if row.mutant.adapter else {}),
        "workloads": {one["workload"]: _told(one) for one in row.judged},
    }


def _told(judgement: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell, and which of the documents' checks are red."""
    red = [check for check, found in judgement["fixed"].items() if found]
    return {name: value for name, value in {**judgement, "fixed": red}.items() if value and name != "workload"}

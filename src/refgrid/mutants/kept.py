"""The files that keep a report, mutants.md and mutants.json; a run changes the verdicts that it gave and no others."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jinja2

from refgrid.dataset.case import SIZES, Size
from refgrid.mutants.report import DECIDING, PARTS, Column, Report, Row, Run, differing
from refgrid.mutants.table import Mutant, MutantError
from refgrid.report.matrix import escaped, replace_file

Today = Callable[[Mutant, str, Size], Mapping[str, str]]  # a mutant's parts on a device at a size, `Parts.of`

_JSON, _PAGE = "mutants.json", "mutants.md"
_BY_LINE = ("mutants", "elsewhere")  # what of the data is a list of mutants


def keep(report: Report, folder: Path, table: Sequence[Mutant], parts: Today) -> list[Path]:
    """Add what a run found to what the folder keeps; returns both files. Raises as `read` and `write_files` do."""
    return write_files(aged(merged(read(folder, table, report.checks), report, table), parts), folder)


def merged(kept: Report, new: Report, table: Sequence[Mutant]) -> Report:
    """What was kept, but of the mutants of the table alone, and with the new verdicts of those that ran."""
    rows = {row.key: row for row in kept.rows}
    unproven = {key for key, row in rows.items() if row.fate == "not-run"}
    rows.update({row.key: row for row in new.rows if row.fate != "not-run" or row.key not in rows.keys() - unproven})
    judged = {row.mutant.id for row in rows.values()}
    elsewhere = {mutant.id for mutant in (*kept.elsewhere, *new.elsewhere)} - judged
    place = {mutant.id: number for number, mutant in enumerate(table)}
    standing = [row for row in rows.values() if row.mutant.id in place]
    return Report(
        tuple(sorted(standing, key=lambda row: (place[row.mutant.id], row.run.device, SIZES.index(row.size)))),
        tuple(mutant for mutant in table if mutant.id in elsewhere),
        new.checks,
        tuple(mutant.id for mutant in table if mutant.id not in judged | elsewhere),
    )


def aged(report: Report, parts: Today) -> Report:
    """The same, with how many verdicts followed from other parts than today's, and which from other code."""
    found = [(row, differing(row.parts, parts(row.mutant, *row.column))) for row in report.rows]
    count = Counter(name for _, names in found for name in names)
    outdated = (f"{row.mutant.id} ({' '.join(row.column)})" for row, names in found if {*names} & {*DECIDING})
    return replace(report, older={name: count[name] for name in PARTS if count[name]}, outdated=tuple(outdated))


def settled(report: Report, device: str, environment: Mapping[str, str], parts: Today) -> set[tuple[str, Size]]:
    """Mutants, by id, and sizes at which they were judged on this device with these libraries and today's parts."""
    return {
        (row.mutant.id, row.size)
        for row in report.rows
        if (row.run.device, row.run.environment) == (device, environment)
        and row.fate != "not-run"
        and not differing(row.parts, parts(row.mutant, *row.column))
    }


def read(folder: Path, table: Sequence[Mutant], checks: Sequence[str]) -> Report:
    """What the folder keeps of the mutants as they stand in the table today; an empty report where it keeps nothing.

    Raises MutantError for a file that is none of this version.
    """
    file = folder / _JSON
    if not file.exists():
        return Report((), (), tuple(checks))
    known = {(mutant.id, mutant.digest): mutant for mutant in table}
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        runs = [_run(each) for each in data["runs"]]
        found = [(known.get((one["id"], one["digest"])), one) for one in data["mutants"]]
        rows = tuple(_row(mutant, each, runs) for mutant, one in found if mutant for each in one["verdicts"])
        away = [known.get((one["id"], one["digest"])) for one in data["elsewhere"]]
        waiting, older, outdated = tuple(data["waiting"]), dict(data["older"]), tuple(data.get("outdated", ()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MutantError(f"{file}: is no report that this version can add to ({reason}); move it away") from error
    return Report(rows, tuple(mutant for mutant in away if mutant), tuple(checks), waiting, older, outdated)


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write mutants.md and mutants.json, each whole or not at all; returns both. Raises OSError as the folder does."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {_PAGE: to_page(report), _JSON: to_json(to_dict(report))}
    return [replace_file(folder / name, text) for name, text in texts.items()]


def to_page(report: Report) -> str:
    """The page, in Markdown."""
    jinja = jinja2.Environment(loader=jinja2.PackageLoader("refgrid"), trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = escaped
    return jinja.get_template("mutants.md.j2").render(report=report)


def to_dict(report: Report) -> dict[str, Any]:
    """Everything as plain data, for strict JSON; the `run` of a verdict counts those of `runs` from 0."""
    return {
        "summary": list(report.summary),
        "exit_code": report.exit_code,
        "columns": {column.name: _sums(column) for column in report.columns},
        "runs": [_plain_run(run) for run in report.runs],
        "older": dict(report.older),
        "outdated": list(report.outdated),
        "waiting": list(report.waiting),
        "mutants": [_plain(rows, report.runs) for rows in report.by_mutant.values()],
        "elsewhere": [
            {"id": mutant.id, "digest": mutant.digest, "device": mutant.device} for mutant in report.elsewhere
        ],
    }


def _sums(column: Column) -> dict[str, Any]:
    fixed = {check: column.fixed(check) for check in column.checks}
    return {"counts": dict(column.counts), "cells": dict(column.cells), "fixed": fixed}


def to_json(data: Mapping[str, Any]) -> str:
    """Strict JSON, one mutant a line: a change of one is one line of a diff."""
    head = {name: value for name, value in data.items() if name not in _BY_LINE}
    parts = [json.dumps(head, indent=1, allow_nan=False)[:-2]]
    for name in _BY_LINE:
        lines = ",\n".join(f"  {json.dumps(mutant, allow_nan=False)}" for mutant in data[name])
        parts.append(f' "{name}": [\n{lines}\n ]')
    return ",\n".join(parts) + "\n}\n"


def _plain_run(run: Run) -> dict[str, Any]:
    alarms = {check: list(counts) for check, counts in run.false_alarms.items()}
    return {**asdict(run), "sizes": list(run.sizes), "false_alarms": alarms, "unsound": list(run.unsound)}


def _run(told: Mapping[str, Any]) -> Run:
    alarms = {check: (red, of) for check, (red, of) in told["false_alarms"].items()}
    where = (told["date"], told["device"], tuple(told["sizes"]), told["environment"])
    return Run(*where, alarms, tuple(told["unsound"]))


def _plain(rows: Sequence[Row], runs: Sequence[Run]) -> dict[str, Any]:
    mutant, place = rows[0].mutant, rows[0].mutant.where
    return {
        "id": mutant.id,
        "digest": mutant.digest,
        "definition": place.definition + ("~twin" if place.twin else ""),
        "planted_in": mutant.adapter or "reference",
        **({"equivalent": mutant.equivalent} if mutant.equivalent else {}),
        "verdicts": [_plain_row(row, runs.index(row.run)) for row in rows],
    }


def _plain_row(row: Row, run: int) -> dict[str, Any]:
    return {
        "device": row.run.device,
        "size": row.size,
        "run": run,
        "fate": row.fate,
        "parts": dict(row.parts),
        "fixed": dict(row.fixed),
        **({"self_test": row.self_test} if row.mutant.adapter else {}),
        "workloads": {one["workload"]: _told(one) for one in row.judged},
    }


def _row(mutant: Mutant, told: Mapping[str, Any], runs: Sequence[Run]) -> Row:
    judged = tuple(_judged(workload, one) for workload, one in told["workloads"].items())
    size, run = told["size"], runs[told["run"]]
    return Row(mutant, size, judged, told["fixed"], told.get("self_test", ""), run, told["parts"])


def _told(judgement: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell, and which of the documents' checks are red."""
    red = [check for check, found in judgement["fixed"].items() if found]
    return {name: value for name, value in {**judgement, "fixed": red}.items() if value and name != "workload"}


def _judged(workload: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """The judgement that `_told` has shortened, in its order: written again, it is the same text."""
    nothing = {"fate": "", "verdict": "", "against": "", "reason": "", "change": 0.0}
    return {"workload": workload, **nothing, **told, "fixed": dict.fromkeys(told.get("fixed", ()), True)}

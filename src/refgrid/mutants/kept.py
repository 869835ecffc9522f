"""The files that keep a report, mutants.md and mutants.json; a run changes the mutants that it judged and no others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2

from refgrid.mutants.report import Report, Row, Run
from refgrid.mutants.table import Mutant, MutantError
from refgrid.report.matrix import escaped, replace_file

_JSON, _PAGE = "mutants.json", "mutants.md"
_BY_LINE = ("mutants", "elsewhere")  # what of the data is a list of mutants


def keep(report: Report, folder: Path, table: Sequence[Mutant]) -> list[Path]:
    """Add what a run found to what the folder keeps; returns both files. Raises as `read` and `write_files` do."""
    return write_files(merged(read(folder, table, report.checks), report, table), folder)


def merged(kept: Report, new: Report, table: Sequence[Mutant]) -> Report:
    """What was kept, but the mutants of the table alone, and with the new verdicts of those that ran."""
    rows = {row.mutant.id: row for row in kept.rows}
    rows.update({row.mutant.id: row for row in new.rows if row.fate != "not-run" or row.mutant.id not in rows})
    elsewhere = {mutant.id for mutant in (*kept.elsewhere, *new.elsewhere)} - set(rows)
    return Report(
        tuple(rows[mutant.id] for mutant in table if mutant.id in rows),
        tuple(mutant for mutant in table if mutant.id in elsewhere),
        new.checks,
    )


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
        rows = tuple(_row(mutant, one, runs[one["run"]]) for mutant, one in found if mutant)
        away = [known.get((one["id"], one["digest"])) for one in data["elsewhere"]]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise MutantError(f"{file}: is no report that this version can add to ({reason}); move it away") from error
    return Report(rows, tuple(mutant for mutant in away if mutant), tuple(checks))


def write_files(report: Report, folder: Path) -> list[Path]:
    """Write mutants.md and mutants.json, each whole or not at all; returns both. Raises OSError as the folder does."""
    folder.mkdir(parents=True, exist_ok=True)
    jinja = jinja2.Environment(loader=jinja2.PackageLoader("refgrid"), trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = escaped
    page = jinja.get_template("mutants.md.j2").render(report=report)
    texts = {_PAGE: page, _JSON: to_json(to_dict(report))}
    return [replace_file(folder / name, text) for name, text in texts.items()]


def to_dict(report: Report) -> dict[str, Any]:
    """Everything as plain data, for strict JSON; the `run` of a mutant counts those of `runs` from 0."""
    return {
        "summary": report.summary,
        "exit_code": report.exit_code,
        "counts": dict(report.counts),
        "cells": dict(report.cells),
        "fixed": {check: report.fixed(check) for check in report.checks},
        "runs": [_plain_run(run) for run in report.runs],
        "mutants": [_plain(row, report.runs.index(row.run)) for row in report.rows],
        "elsewhere": [
            {"id": mutant.id, "digest": mutant.digest, "device": mutant.device} for mutant in report.elsewhere
        ],
    }


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
    return Run(told["device"], tuple(told["sizes"]), told["environment"], alarms, tuple(told["unsound"]))


def _plain(row: Row, run: int) -> dict[str, Any]:
    place = row.mutant.where
    return {
        "id": row.mutant.id,
        "digest": row.mutant.digest,
        "definition": place.definition + ("~twin" if place.twin else ""),
        "planted_in": row.mutant.adapter or "reference",
        "run": run,
        "fate": row.fate,
        "fixed": dict(row.fixed),
        **({"equivalent": row.mutant.equivalent} if row.mutant.equivalent else {}),
        **({"self_test": row.self_test} if row.mutant.adapter else {}),
        "workloads": {one["workload"]: _told(one) for one in row.judged},
    }


def _row(mutant: Mutant, told: Mapping[str, Any], run: Run) -> Row:
    judged = tuple(_judged(workload, one) for workload, one in told["workloads"].items())
    return Row(mutant, judged, told["fixed"], told.get("self_test", ""), run)


def _told(judgement: Mapping[str, Any]) -> dict[str, Any]:
    """What there is to tell, and which of the documents' checks are red."""
    red = [check for check, found in judgement["fixed"].items() if found]
    return {name: value for name, value in {**judgement, "fixed": red}.items() if value and name != "workload"}


def _judged(workload: str, told: Mapping[str, Any]) -> dict[str, Any]:
    """The judgement that `_told` has shortened, in its order: written again, it is the same text."""
    nothing = {"fate": "", "verdict": "", "against": "", "reason": "", "change": 0.0}
    return {"workload": workload, **nothing, **told, "fixed": dict.fromkeys(told.get("fixed", ()), True)}

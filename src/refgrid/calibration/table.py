"""The table that calibration writes: tolerance.json beside the module that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refgrid.calibration.derive import Row, derived
from refgrid.calibration.evidence import seen, tightened
from refgrid.dataset.definition import DataSet
from refgrid.records.record import read_runs

_ABOUT = (
    "Written by `nox -s calibrate` from results/calibration/ and the committed records; never edited by hand. "
    "One row a truth, output and dtype; results/calibration/report.md explains them."
)


def measurements(folder: Path) -> list[dict[str, Any]]:
    """Those of every environment, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def rows(measured: Iterable[dict[str, Any]], results: Path, dataset: DataSet) -> list[Row]:
    """What calibration measured, and where it has not, what committed records prove."""
    found = {_key(row): row for measurement in measured for row in derived(measurement)}
    runs = [run for run in read_runs(results) if run.file.parent == results]
    return sorted({**{_key(row): row for row in tightened(seen(runs, dataset))}, **found}.values(), key=_key)


def write(found: Sequence[Row], file: Path) -> None:
    """One row a line."""
    lines = ",\n".join("  " + json.dumps(row.to_dict()) for row in found)
    file.write_text(f'{{\n "about": {json.dumps(_ABOUT)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.truth, row.op, row.dtype, row.output

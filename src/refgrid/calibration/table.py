"""The table that calibration writes: tolerance.json beside the module that reads it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refgrid.calibration.derive import Row, derived
from refgrid.calibration.evidence import seen, tightened, widened
from refgrid.calibration.left_out import left_out
from refgrid.dataset.definition import DataSet
from refgrid.records.record import Run, read_runs

_ABOUT = (
    "Written by `nox -s calibrate` from results/calibration/ and the committed records; never edited by hand. "
    "One row a truth, output and dtype; results/calibration/report.md explains them."
)


def measurements(folder: Path) -> list[dict[str, Any]]:
    """Those of every environment, by name."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]


def committed(results: Path) -> list[Run]:
    """The runs that are kept in the folder itself."""
    return [run for run in read_runs(results) if run.file.parent == results]


def rows(measured: Iterable[dict[str, Any]], runs: Iterable[Run], dataset: DataSet) -> list[Row]:
    """What calibration measured, no tighter than committed records need; where it has not, what these prove."""
    proven = seen(runs, dataset)
    drawn = [row for measurement in measured for row in derived(measurement, left_out(measurement, dataset))]
    found = {_key(row): row for row in tightened(proven)}
    return sorted({**found, **{_key(row): widened(row, proven.get(_key(row))) for row in drawn}}.values(), key=_key)


def write(found: Sequence[Row], file: Path) -> None:
    """One row a line."""
    lines = ",\n".join("  " + json.dumps(row.to_dict()) for row in found)
    file.write_text(f'{{\n "about": {json.dumps(_ABOUT)},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.truth, row.op, row.dtype, row.output

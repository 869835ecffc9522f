"""What tests of the calibration share: the data set, the committed runs, measurements made up and the row of one."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from refgrid.calibration.derive import Row, derived
from refgrid.calibration.rounding import FLOAT64, FORMULA, REFERENCE
from refgrid.calibration.table import committed as runs_in
from refgrid.calibration.table import measurements
from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.records.record import Run

ROOT = Path(__file__).resolve().parents[1]


@cache
def dataset() -> DataSet:
    """The definitions and workloads of this repository."""
    return load_dataset(ROOT)


def besides(name: str) -> list[dict[str, Any]]:
    """What is committed beside the errors: "samples" or "sums"."""
    return measurements(ROOT / "results/calibration" / name)


@cache
def committed() -> list[Run]:
    """The runs in results/."""
    return runs_in(ROOT / "results")


def measured(dtype: str = "bfloat16", **parties: tuple[float, float]) -> dict[str, Any]:
    """A measurement of one op; parties by name: the error beyond rounding, and the atol needed beside rtol."""
    named = {"reference": (REFERENCE, FLOAT64), "formula": (FORMULA, FLOAT64), "own": ("lib", FLOAT64)}
    found = []
    for name, (error, needed) in parties.items():
        who, against = named.get(name, (REFERENCE, "lib"))
        spread = {f"beyond_{rtol}": [0, 0, 0, needed] for rtol in ("least", "kept")}
        row = {"beyond_rounding": [0, 0, 0, error], **spread, "row": [0, 0, 0, error], "abs": [0] * 4, "rel": [0] * 4}
        found.append(
            {"op": "some_op", "dtype": dtype, "output": "y", "who": who, "against": against, "draws": 9, **row}
        )
    environment = {"name": "here", "device": "cpu", "gpu": None, "libraries": {"torch": "2"}}
    return {"environment": environment, "date": "2026-01-02T03:04", "seeds": 9, "workloads": {}, "measured": found}


def derive(dtype: str = "bfloat16", **parties: tuple[float, float]) -> Row:
    (row,) = derived(measured(dtype, **parties))
    return row

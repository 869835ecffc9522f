"""A table of four environments and the machines that tests try them on."""

from __future__ import annotations

import json
from pathlib import Path

from refgrid.environments.machine import Machine, Readiness, readiness

H200 = ("NVIDIA H200",)
TABLE = """
[[environment]]
name = "cpu"
kind = "venv"
python = ">=3.11,<3.14"
pins = ["torch==2.13.0"]
origin = "a test"
exclude-newer = 2026-11-20

[[environment]]
name = "cu128-old"
kind = "venv"
python = "3.12"
pins = ["torch==2.8.0"]
cuda = "12.8"
origin = "a test"
exclude-newer = 2026-11-20

[[environment]]
name = "cu128-gone"
kind = "venv"
python = "3.12"
pins = ["torch==2.9.0"]
cuda = "12.8"
origin = "a test"
exclude-newer = 2026-11-20

[[environment]]
name = "over"
kind = "overlay"
python = "3.12"
pins = ["flashinfer-python==0.6.12"]
machine = ["torch==2.11.0+cu130"]
cuda = "13.0"
origin = "a test"
exclude-newer = 2026-11-20
"""
CONTAINER = Machine(H200, "580.159", "13.0", "/usr/bin/python3", "3.12.3", {"torch": "2.11.0+cu130"})


def table_below(folder: Path) -> Path:
    """Write the table; one of its environments cannot be resolved any more, and the wheels of the overlay are there."""
    locks = folder / "ci" / "locks"
    locks.mkdir(parents=True)
    (locks / "cu128-gone.unresolvable.txt").write_text("# nox -s lock -- cu128-gone\nthere is no version of a==1\n")
    (folder / "wheelhouse").mkdir()
    told = {"format": 2, "environments": {"over": {}}, "wheels": []}
    (folder / "wheelhouse" / "manifest.json").write_text(json.dumps(told))
    file = folder / "ci" / "environments.toml"
    file.write_text(TABLE)
    return file


def ready(table: Path, machine: Machine) -> list[Readiness]:
    """Which of them a machine can run."""
    return readiness(table, table.parents[1] / "results" / "local", machine)

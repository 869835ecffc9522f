"""What pytest's report of a run on a GPU says of where it ran: `--junitxml` keeps it beside the tests."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import pytest
from _pytest.junitxml import xml_key


def pytest_sessionstart(session: pytest.Session) -> None:
    """Told by who writes the report: what record_testsuite_property takes in a worker of xdist is lost."""
    report = session.config.stash.get(xml_key, None)
    if report is not None:
        for name, value in _told().items():
            report.add_global_property(name, value)


def _told() -> dict[str, str]:
    """The GPU, torch, the date, and, where the instrument is, all that it measures of an environment."""
    found = _environment()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"environment": json.dumps(found), "gpu": str(found["gpu"]), "torch": str(found["torch"]), "date": date}


def _environment() -> dict[str, Any]:
    name = os.environ.get("REFGRID_ENVIRONMENT", "local")
    if importlib.util.find_spec("refgrid") is None:  # tests of solutions/ run without it
        import torch

        return {"name": name, "gpu": torch.cuda.get_device_name(), "torch": version("torch")}
    from refgrid.environments.measured import measure
    from refgrid.sources import Sources

    return asdict(measure(name, "cuda", Sources().distributions))

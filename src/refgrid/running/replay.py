"""The one command that runs a single case again, as its failure report prints it."""

from __future__ import annotations

import math
import shlex

import pytest

from refgrid.dataset.case import Case
from refgrid.environments.declared import with_sessions


def replay_command(config: pytest.Config, nodeid: str, case: Case, device: str) -> str:
    """What runs the case of one test again, where this run ran it, "cpu" or "cuda".

    To be given to a shell in the folder of the noxfile or, where there is none, of pytest's configuration.

    An environment that this checkout declares is prepared by its session; any other is the one that pytest is in.
    """
    environment = config.getoption("--environment")
    if environment in with_sessions(config.rootpath):
        command = ["nox", "-s", f"tests-{environment}", "--", nodeid]
    else:
        command = ["pytest", nodeid, "--device", device, "--environment", environment]
    return shlex.join([*command, "--test-sizes", case.size, *_kept(config, case)])


def _kept(config: pytest.Config, case: Case) -> list[str]:
    """The options of this run without which the case would be another one."""
    option = config.getoption
    told = {name: option(name) for name in ("--tolerance", "--reason", "--dataset")}
    told |= {"--seed": case.seed or None, "--seeds": 1 if option("--seeds") else None}
    if math.isfinite(memory := option("--memory")):
        told["--memory"] = int(memory)
    return [part for name, value in told.items() if value is not None for part in (name, str(value))]

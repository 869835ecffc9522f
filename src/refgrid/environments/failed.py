"""An environment that could not be installed: every case that a run would owe ends in one verdict, none is run.

pytest itself collects, with this module as a plugin, so that what is owed is what the same arguments would have run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from refgrid.records.record import Verdict

if TYPE_CHECKING:
    from refgrid.dataset.case import Case

# What the installers say while things still go well.
_PROGRESS = re.compile(
    r"\s*(Resolved|Prepared|Installed|Uninstalled|Audited|Using|Downloading|Downloaded|Building|Built|Updating|nox >|#"
    r"|[-+~] )"
)
LAST_LINES, LONGEST = 12, 1500
# Plugins of a run that have no business where nothing runs: leases of GPUs, results of before, warming up.
_IDLE = ("refgrid-worker", "refgrid-controller", "refgrid-budget", "refgrid-settled", "refgrid-warm")
_TOLD = pytest.StashKey[tuple[Verdict, str]]()


def record(environment: str, verdict: Verdict, log: Path, pytest_args: Sequence[str]) -> int:
    """Run pytest with every case closed before it begins, for the reason that a log ends with; returns pytest's status.

    Raises nothing of its own: a column without cases is pytest's error.
    """
    ours = ["xdist.plugin", "refgrid.plugin", __name__, "no:cacheprovider"]
    plugins = [argument for name in ours for argument in ("-p", name)]
    told = [f"--environment={environment}", f"--every-case={verdict.value}", f"--because-of={log}"]
    command = ["pytest", *plugins, *pytest_args, *told, "--no-audit", "-n0", "--no-header", "--no-summary", "-q"]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run([sys.executable, "-m", *command], env=alone, check=False).returncode


def pytest_addoption(parser: pytest.Parser) -> None:
    """What becomes of every case, and the file that says why."""
    parser.addoption("--every-case", type=Verdict, required=True)
    parser.addoption("--because-of", type=Path, required=True)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Read the log, and send away what was registered for a run."""
    log = config.getoption("--because-of").read_text(encoding="utf-8", errors="replace")
    config.stash[_TOLD] = (config.getoption("--every-case"), last_words(log))
    for name in filter(config.pluginmanager.has_plugin, _IDLE):
        plugin = config.pluginmanager.unregister(name=name)
        getattr(plugin, "pytest_unconfigure", lambda: None)()  # it may have opened something


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool:
    """The verdict instead of a run. What is no case is left out: it could not run either, and nobody owes it."""
    from refgrid.plugin import case_of

    if case := case_of(item):
        item.ihook.pytest_runtest_logreport(report=_report(item, case, *item.config.stash[_TOLD]))
    return True


def _report(item: pytest.Item, case: Case, verdict: Verdict, reason: str) -> pytest.TestReport:
    told = f"{verdict.value}: {reason}"
    failed = verdict.colour == "red"
    return pytest.TestReport(
        item.nodeid,
        item.location,
        dict.fromkeys(item.keywords, 1),
        "failed" if failed else "skipped",
        told if failed else (str(item.path), item.location[1] or 0, told),
        "call",
        user_properties=[("refgrid", {"case": case, "verdict": verdict, "reason": reason})],
    )


def last_words(log: str) -> str:
    """The last meaningful lines of an installer: its error, not its progress."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", log).replace("\r", "\n")
    lines = [" ".join(line.split()) for line in plain.splitlines() if line.strip() and not _PROGRESS.match(line)]
    return " ".join(lines[-LAST_LINES:])[-LONGEST:] or "the installer ended without a word"

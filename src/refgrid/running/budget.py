"""`--budget`: when the time of a run is spent, cases that are running end normally and the rest are `not-run`."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from refgrid.records.record import Verdict

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
# How an outcome says that its case had no turn.
SPENT = re.compile(r"^the budget of (\w+) was spent$")
_ENDS = "refgrid_budget_ends"


def parse_duration(text: str) -> int:
    """Seconds of a duration such as 20m, 1h30m or 90s; raises ValueError saying how one is written."""
    found = _DURATION.fullmatch(text.strip())
    hours, minutes, seconds = (int(part or 0) for part in found.groups()) if found else (0, 0, 0)
    if not (total := 3600 * hours + 60 * minutes + seconds):
        raise ValueError(f"{text!r} is no duration; it should be written as 20m, 1h30m or 90s, and not be zero")
    return total


def told_duration(seconds: float) -> str:
    """A duration as `parse_duration` reads it, in whole seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "m"), (rest, "s"))
    return "".join(f"{number}{unit}" for number, unit in parts if number) or "0s"


class BudgetSpent(Exception):
    """A case's turn came when there was no time left."""

    verdict = Verdict.NOT_RUN

    def __init__(self, budget: int) -> None:
        self.reason = f"the budget of {told_duration(budget)} was spent"
        super().__init__(self.reason)


class Budget:
    """Lives in every process of a run; all, also a worker that replaces a dead one, look at one end."""

    def __init__(self, config: pytest.Config, seconds: int) -> None:
        self._seconds = seconds
        told: dict[str, Any] = getattr(config, "workerinput", {})
        self._ends = told.get(_ENDS, time.monotonic() + seconds)  # of the machine, so the same in every process

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Tell a worker when the run's time ends."""
        node.workerinput[_ENDS] = self._ends

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """See whether there is time left, before anything is prepared for a case."""
        from refgrid.plugin import case_of

        if case_of(item) and time.monotonic() >= self._ends:
            raise BudgetSpent(self._seconds)

"""Keeps the records of one pytest run: lives in the controller, writes one line a case as it is reported."""

from __future__ import annotations

import platform
import sys
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

import pytest
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refgrid.case import Case
from refgrid.contract import METHODS
from refgrid.environment import measure
from refgrid.record import Header, Ledger, Outcome, RecordError, Verdict, now

if TYPE_CHECKING:
    from refgrid.plugin import Grid


_OUTCOME = TypeAdapter(Outcome)


class Recorder:
    """Opens the ledger when the cases are known, closes it when the session ends, whatever ended it."""

    def __init__(self, config: pytest.Config, grid: Grid) -> None:
        self._config, self._grid = config, grid
        self._ledger: Ledger | None = None
        self._bar = _Bar() if config.getoption("--progress") else None
        self._stopped = ""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without xdist this process has collected the cases itself."""
        self._plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """With xdist the workers have; all collect the same."""
        self._plan(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line a case, at once."""
        for name, value in report.user_properties:
            if name == "refgrid":
                self._close(_OUTCOME.validate_python(value))
        if str(report.when) == "???":  # xdist's report of a worker that died in the middle of a case
            case = self._planned(report.nodeid)
            if case:
                self._close(Outcome(case, Verdict.CRASH, str(report.longrepr).strip().splitlines()[0]))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Under the progress bar no letter a test."""
        if self._bar and report.when == "call" and self._ledger:
            return report.outcome, "", ""
        return None

    def pytest_keyboard_interrupt(self) -> None:
        """Remember why the rest did not run."""
        self._stopped = "the run was interrupted before its turn"

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Account for every planned case; an unexplained gap is never a success."""
        if self._ledger is None:
            return
        gap = len(self._ledger.open_cases)
        self._ledger.finish(self._stopped or "the run ended before its turn")
        if gap and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if self._bar:
            self._bar.stop()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Planned = accounted, and where the records are."""
        if self._ledger is None:
            return
        counts = self._ledger.verdicts
        told = ", ".join(f"{counts[verdict.value]} {verdict.value}" for verdict in Verdict if counts[verdict.value])
        planned = len(self._ledger.header.planned)
        terminalreporter.section("refgrid")
        terminalreporter.line(f"planned {planned} = accounted {counts.total()}: {told}")
        terminalreporter.line(f"records: {self._ledger.path}")

    def _plan(self, nodeids: Sequence[str]) -> None:
        planned = tuple(case for nodeid in nodeids if (case := self._planned(nodeid)))
        if self._ledger or not planned or self._config.getoption("collectonly"):
            return
        option = self._config.getoption
        _ = self._grid.expected  # an entry that is not true stops the run before its first case
        environment = measure(option("--environment"), self._grid.device, self._grid.sources.distributions)
        header = Header(uuid.uuid4().hex[:12], now(), version("refgrid"), environment, planned)
        folder = option("--results") or self._config.rootpath / "results" / "local"
        try:
            self._ledger = Ledger(folder / f"{_file_name(header)}.jsonl", header)
        except RecordError as error:
            raise pytest.UsageError(str(error)) from error
        if self._bar:
            self._bar.start(f"{environment.title}: {len(planned)} cases", len(planned))

    def _planned(self, nodeid: str) -> Case | None:
        name, _, rest = nodeid.rpartition("::")[2].partition("[")
        return self._grid.cases.get(rest.removesuffix("]")) if name in METHODS else None

    def _close(self, outcome: Outcome) -> None:
        assert self._ledger is not None, "a case was reported before any was planned"
        if outcome.case.id not in self._ledger.open_cases:
            return  # a failing teardown after the verdict; pytest shows it
        self._ledger.close_case(outcome)
        if self._bar:
            self._bar.advance(outcome.verdict)


def _file_name(header: Header) -> str:
    """One file a run: a run that goes on elsewhere never shares a file with another."""
    environment = header.environment
    machine = environment.gpu if environment.device == "cuda" and environment.gpu else platform.machine()
    slug = f"{environment.name}-{machine}-{header.started}-{header.run}"
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in slug).lower()


class _Bar:
    """A bar on a terminal; where there is none, a line at every tenth."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, TextColumn("[red]{task.fields[red]}"), console=self._console)
        self._done, self._total, self._red = 0, 0, 0

    def start(self, title: str, total: int) -> None:
        self._total = total
        self._task = self._progress.add_task(title, total=total, red="")
        if self._console.is_terminal:
            self._progress.start()
        else:
            self._console.print(title)

    def advance(self, verdict: Verdict) -> None:
        self._done += 1
        self._red += verdict.colour == "red"
        red = f"{self._red} red" if self._red else ""
        self._progress.update(self._task, advance=1, red=red)
        tenth = self._done * 10 // self._total
        if not self._console.is_terminal and tenth > (self._done - 1) * 10 // self._total:
            self._console.print(f"{tenth * 10:4d}%  {self._done} of {self._total} cases {red}")

    def stop(self) -> None:
        self._progress.stop()

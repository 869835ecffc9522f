"""Keeps the records of one pytest run: lives in the controller, writes one line a case as it is reported."""

from __future__ import annotations

import platform
import shlex
import shutil
import sys
import uuid
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import pytest
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from refgrid.caching.settled import Settled, is_green
from refgrid.dataset.case import Case
from refgrid.environments import kernel_cache
from refgrid.environments.audit import EXIT_CODE, audit_named
from refgrid.environments.declared import LOCAL, EnvironmentsError, declared_as, load_environments
from refgrid.environments.imports import Imports
from refgrid.environments.measured import Environment
from refgrid.records.ledger import Ledger
from refgrid.records.record import INTERRUPTED, Header, Outcome, RecordError, Verdict, now
from refgrid.running.failure import shown
from refgrid.running.fresh import demand_rendered
from refgrid.running.journal import open_folder
from refgrid.running.worker import NoLease, WaitingForGpu
from refgrid.warming.late_compiles import CompiledModules

if TYPE_CHECKING:
    from refgrid.running.grid import Grid


_OUTCOME = TypeAdapter(Outcome)


class Recorder:
    """Opens the ledger when the cases are known, closes it when the session ends, whatever ended it."""

    def __init__(self, config: pytest.Config, grid: Grid, settled: Settled) -> None:
        self._config, self._grid, self._settled = config, grid, settled
        self._ledger: Ledger | None = None
        self._journals: TextIO | None = None
        self._bar = _Bar() if config.getoption("--progress") else None
        self._session: pytest.Session | None = None
        self._stopped, self._broken = "", ""
        self._findings: tuple[str, ...] = ()
        self._explained: list[str] = []
        self.late_findings: list[str] = []  # what others find out during the run; written with its end

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """What would make the whole column untrue ends the run here, before a worker starts."""
        self._session = session
        self._compiled = CompiledModules(kernel_cache.flashinfer_base(), kernel_cache.tvm_ffi_folder())
        option, table = self._config.getoption, self._config.rootpath / "ci" / "environments.toml"
        demand_declared(table, option("--environment"))
        demand_rendered(self._grid.root)
        if option("--no-audit"):
            self._findings = ("not audited: --no-audit",)
        if option("collectonly") or option("--no-audit"):
            return
        self._findings = audited(table, self._settled.environment, Imports(self._grid.results / ".digests"))

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Without xdist this process has collected the cases itself."""
        self._plan([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        """With xdist the workers have; all collect the same."""
        self._plan(ids)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One line a case, at once."""
        for name, value in report.user_properties:
            if name == "refgrid":
                outcome = _OUTCOME.validate_python(value)
                self.close(outcome)
                if outcome.verdict.colour == "red":  # here, as of what a worker sends only texts arrive
                    report.longrepr = cast(Any, shown(outcome, report.longrepr))

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        """Under the progress bar no letter a test."""
        if self._bar and report.when == "call" and self._ledger:
            # An expected failure is no skip: pytest's summary wants another kind of text of those.
            return "xfailed" if hasattr(report, "wasxfail") else report.outcome, "", ""
        return None

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """A process without a GPU is heard at once, not with pytest's other warnings at the end."""
        message, terminal = warning_message.message, self._config.pluginmanager.get_plugin("terminalreporter")
        if isinstance(message, WaitingForGpu | NoLease) and terminal:
            terminal.write_line(f"\n{message}", yellow=True)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Remember why the rest did not run; xdist ends a run with `-x` as if somebody had interrupted it."""
        enough = "stopping after" in str(excinfo.value)
        self.stopped("the run stopped before its turn, as -x or --maxfail asks" if enough else INTERRUPTED)

    def stopped(self, reason: str) -> None:
        """Say why what has not run yet will not run; the first reason counts."""
        self._stopped = self._stopped or reason

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Account for every planned case; an unexplained gap is never a success."""
        if self._ledger is None:
            return
        gap = len(self._ledger.open_cases)
        if self._broken:
            return  # the records end where they broke off
        self.late_findings += self._compiled.late()
        self._ledger.finish(self._stopped or "the run ended before its turn", self.late_findings)
        if session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            wrong = gap or not is_green(self._ledger.verdicts)  # red may be what a run that goes on had before
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if wrong else pytest.ExitCode.OK
        if self._bar:
            self._bar.stop()

    def pytest_unconfigure(self) -> None:
        """What the workers' journals say is in the records now."""
        shutil.rmtree(self._grid.journals, ignore_errors=True)
        if self._journals:
            self._journals.close()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Planned = accounted, and where the records are."""
        if self._ledger is None:
            return
        counts = self._ledger.verdicts
        told = ", ".join(f"{counts[verdict.value]} {verdict.value}" for verdict in Verdict if counts[verdict.value])
        planned = len(self._ledger.header.planned)
        terminalreporter.section("refgrid")
        if self._broken:
            terminalreporter.line(f"records are incomplete: {self._broken}", red=True)
        equal = "=" if planned == counts.total() else "but"
        terminalreporter.line(f"planned {planned} {equal} accounted {counts.total()}: {told}")
        for line in (*self._settled.told(), *self._explained):
            terminalreporter.line(line)
        for finding in (*self._ledger.header.findings, *self.late_findings):
            terminalreporter.line(f"finding: {finding}", yellow=True)
        terminalreporter.line(f"records: {self._ledger.path}")

    def _plan(self, nodeids: Sequence[str]) -> None:
        if self._ledger or self._config.getoption("collectonly"):
            return
        ids = {case.id for nodeid in nodeids if (case := self._grid.case_at(nodeid))}
        ids |= self._settled.decision().left_out
        if not ids:
            return
        planned = tuple(self._grid.cases[name] for name in sorted(ids, key=self._grid.order.__getitem__))
        _ = self._grid.expected  # an entry that is not true stops the run before its first case
        if self._config.getoption("--explain"):  # now, before this run's own records are there to be found
            self._explained = list(self._settled.explained(self._settled.decision().selected))
        try:
            self._ledger = self._opened(planned)
            self._journals = open_folder(self._grid.journals)
        except (RecordError, OSError) as error:
            raise pytest.UsageError(str(error)) from error
        if self._bar:
            self._bar.start(f"{self._settled.environment.title}: {len(planned)} cases", len(planned))
            for verdict in self._ledger.verdicts.elements():
                self._bar.advance(Verdict(verdict))
        for outcome in self._settled.outcomes():
            self._write(outcome)

    def _opened(self, planned: tuple[Case, ...]) -> Ledger:
        """Of the run that goes on, else of a new one."""
        left = self._settled.left()
        if left.run and left.file:
            self.late_findings += [each for each in self._findings if each not in left.run.header.findings]
            return Ledger.resumed(left.run, left.file)
        environment, parts = self._settled.environment, self._settled.keys.run_parts
        told = (uuid.uuid4().hex[:12], now(), version("refgrid"), environment, planned, self._findings, parts)
        command = shlex.join(["pytest", *map(str, self._config.invocation_params.args)])
        header = Header(*told, soak=self._grid.is_soak, command=command)
        return Ledger(self._grid.results / f"{file_name(header)}.jsonl", header)

    def close(self, outcome: Outcome) -> None:
        """Write an outcome of this run, with its key."""
        assert self._ledger is not None, "a case was reported before any was planned"
        if self._broken or outcome.case.id not in self._ledger.open_cases:
            return  # a failing teardown after the verdict; pytest shows it
        self._write(self._settled.keyed(outcome))

    def _write(self, outcome: Outcome) -> None:
        assert self._ledger is not None
        try:
            self._ledger.close_case(outcome)
        except RecordError as error:
            self._break_off(str(error))
        if self._bar:
            self._bar.advance(outcome.verdict)

    def _break_off(self, reason: str) -> None:
        """What cannot be recorded need not run."""
        self._broken = reason
        for runner in (self._session, self._config.pluginmanager.get_plugin("dsession")):
            if runner:
                runner.shouldstop = reason


def file_name(header: Header, end: str = "") -> str:
    """One file a run: a run that goes on elsewhere never shares a file with another. `end` replaces time and run."""
    return _slug(f"{column_name(header)}-{end or f'{header.started}-{header.run}'}")


def column_name(header: Header) -> str:
    """The environment and the kind of machine, as file names have them."""
    environment = header.environment
    machine = environment.gpu if environment.device == "cuda" and environment.gpu else platform.machine()
    return _slug(f"{environment.name}-{machine}")


def _slug(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text).lower()


def demand_declared(table: Path, name: str) -> None:
    """Raises UsageError for a column that the table, where there is one, does not declare: nobody would audit it."""
    try:
        if name != LOCAL and table.exists():
            declared_as(name, load_environments(table))
    except EnvironmentsError as error:
        raise pytest.UsageError(f"--environment (or REFGRID_ENVIRONMENT): {error}, {LOCAL}") from error


def audited(table: Path, environment: Environment, imports: Imports) -> tuple[str, ...]:
    """The findings of the audit; ends the run, with status 3, where this is not the environment that its name says."""
    try:
        found = audit_named(table, environment, imports)
    except EnvironmentsError as error:
        raise pytest.UsageError(str(error)) from error
    errors = [each.text for each in found if each.severity == "error"]
    if errors:
        told = "".join(f"\n  {each}" for each in errors)
        pytest.exit(f"this is not environment {environment.name!r} of {table}:{told}", returncode=EXIT_CODE)
    kernel_cache.claim(kernel_cache.flashinfer_base(), environment)
    return tuple(each.text for each in found)


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

"""What xdist's controller knows of its workers: which are there, who got no GPU, and how each one died."""

from __future__ import annotations

import signal
import subprocess
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

import pytest

from refgrid.dataset.case import Case
from refgrid.proving.deaths import told_death
from refgrid.records.digest import without_collection
from refgrid.records.record import RecordError, Verdict
from refgrid.running.devices import Device, DeviceError, visible_devices
from refgrid.running.durations import known_seconds
from refgrid.running.journal import Entry, death, last_entry, last_words
from refgrid.running.libraries import cut_short
from refgrid.running.replay import replay_command
from refgrid.running.starting import start_at_once
from refgrid.running.worker import JOURNALS, NoLease, Worker

if TYPE_CHECKING:
    from refgrid.running.grid import Grid
    from refgrid.running.recorder import Recorder
    from refgrid.running.scheduling import LongestFirst

# Workers in a row that die before they have collected: what kills them would kill the next one too.
_STILLBORN = 3
# Of a process whose connection has broken: it is gone, or in a driver call that ends when its kernel does.
_REAP_SECONDS = 10
_OF_A_BAD_LIBRARY = {getattr(signal, name, None) for name in ("SIGBUS", "SIGSEGV", "SIGILL", "SIGABRT")}


def chosen_device(config: pytest.Config) -> str:
    """Whether cases run under leases: "cuda" if a GPU is visible, unless `--device` says otherwise."""
    return cast("str | None", config.getoption("--device")) or ("cuda" if _visible() else "cpu")


def leases_there(config: pytest.Config) -> int | None:
    """How many leases the visible GPUs have; None where cases run on a CPU."""
    if chosen_device(config) == "cpu":
        return None
    return len(_visible()) * cast(int, config.getoption("--workers-per-gpu"))


def _visible() -> tuple[Device, ...]:
    try:
        return visible_devices()
    except DeviceError as error:
        raise pytest.UsageError(str(error)) from error


def register_runner(config: pytest.Config, grid: Grid, recorder: Recorder | None) -> None:
    """What runs cases, this process or xdist's workers; registered before the recorder, which is called before it."""
    if recorder and config.getoption("dist", "no") != "no":
        config.pluginmanager.register(Controller(config, grid, recorder.stopped), "refgrid-controller")
    else:
        worker = Worker(config, grid, recorder.stopped, recorder.close) if recorder else Worker(config, grid)
        config.pluginmanager.register(worker, "refgrid-worker")


class Controller:
    """Registered where xdist's controller runs; the scheduler and the recorder ask it."""

    def __init__(self, config: pytest.Config, grid: Grid, stopped: Callable[[str], None]) -> None:
        """`stopped` is told why the rest will not run."""
        self._config, self._grid, self._stopped = config, grid, stopped
        self._limit = cast(int, config.getoption("--case-timeout"))
        self._deaths: dict[str, tuple[Verdict, str]] = {}
        self._alive: set[str] = set()
        self._collected: set[str] = set()
        self._stillborn = 0
        self._known: Future[dict[str, float]]  # of the reader that starts with the workers
        self.refused: dict[str, str] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, config: pytest.Config, specs: Sequence[Any]) -> None:
        """Read earlier records while the workers start and collect: both take seconds."""
        reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="durations")
        self._known = reader.submit(self._known_seconds)
        reader.shutdown(wait=False)
        session = cast(Any, config.pluginmanager.get_plugin("dsession"))  # xdist's
        start_at_once(session.nodemanager.group, specs)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Of every worker, also of one that replaces another."""
        self._alive.add(node.gateway.id)
        node.workerinput[JOURNALS] = str(self._grid.journals)

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage) -> None:
        """A worker without a lease says so before it reports what it has collected."""
        if isinstance(warning_message.message, NoLease):
            self.refuse(*warning_message.message.args)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """A worker that came so far can run cases."""
        self._collected.add(node.gateway.id)
        self._stillborn = 0

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """Look at how a worker died, before xdist reports the case that it was in."""
        worker = node.gateway.id
        self._alive.discard(worker)
        entry = self.entry(worker)
        if error and entry:
            words = last_words(self._grid.journals, worker)
            status = _status(node)
            libraries = cut_short() if status is not None and -status in _OF_A_BAD_LIBRARY else []
            self._deaths[worker] = death(entry, words, status, self._limit, libraries)
        if error and worker not in self._collected:
            self._count_stillborn(worker, node)

    def _count_stillborn(self, worker: str, node: Any) -> None:
        self._stillborn += 1
        if self._stillborn == _STILLBORN:
            how = told_death(_status(node), last_words(self._grid.journals, worker))
            reason = f"{_STILLBORN} workers in a row died before they had collected the cases; {worker} {how}"
            self._stopped(reason)
            pytest.exit(reason, returncode=pytest.ExitCode.INTERNAL_ERROR)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: Any) -> None:
        """The outcome of the case that a worker died in travels with xdist's report, as every outcome does."""
        case = self._grid.case_at(crashitem)
        if case:
            verdict, reason = self._death_of(report.node.gateway.id, case)
            device = getattr(self.entry(report.node.gateway.id), "device", "")
            outcome = {"case": asdict(case), "verdict": verdict.value, "reason": reason, "device": device}
            where = "cuda" if self._grid.leases else "cpu"
            outcome["report"] = f"replay: {replay_command(self._config, crashitem, case, where)}"
            report.user_properties.append(("refgrid", outcome))
            report.longrepr = f"{verdict.value}: {reason}\n\n{outcome['report']}"

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> LongestFirst | None:
        """Ours for `--dist load`, the only mode that is safe when workers die."""
        from refgrid.running.scheduling import LongestFirst

        if config.getoption("dist") != "load":
            return None
        return LongestFirst(config, log, self, self._grid, self._known_here())

    def _known_here(self) -> dict[str, float]:
        try:
            return self._known.result()
        except RecordError as error:
            terminal = cast(Any, self._config.pluginmanager.get_plugin("terminalreporter"))
            terminal.write_line(f"earlier durations are not used: {error}", yellow=True)
            return {}

    def _known_seconds(self) -> dict[str, float]:
        committed, own = self._config.rootpath / "results", self._grid.results
        folders = [committed] if own.is_relative_to(committed) else [committed, own]
        with without_collection():
            return known_seconds(folders, self._config.getoption("--environment"), self._grid.device)

    def entry(self, worker: str) -> Entry | None:
        """What a worker wrote last into its journal."""
        return last_entry(self._grid.journals, worker)

    def _death_of(self, worker: str, case: Case) -> tuple[Verdict, str]:
        told = self._deaths.get(worker, (Verdict.CRASH, f"the worker crashed before it could say why [{worker}]"))
        return self._grid.expected.revise(case.name, case.seed, *told)

    @property
    def nobody_is_left(self) -> bool:
        """Whether no worker, also none that is still starting, could run anything."""
        return bool(self.refused) and self._alive <= set(self.refused)

    def refuse(self, worker: str, reason: str) -> None:
        """A worker gets no work; where it was the last one, what remains is not-run."""
        self.refused[worker] = reason
        if self.nobody_is_left:
            self._stopped(reason)


def _status(node: Any) -> int | None:
    """How the process ended, as subprocess tells it; xdist has no public way to it."""
    popen = getattr(getattr(node.gateway, "_io", None), "popen", None)
    try:
        return None if popen is None else cast(int, popen.wait(_REAP_SECONDS))
    except subprocess.TimeoutExpired:
        return None

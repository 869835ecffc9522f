"""Lives where cases run, in each worker or in the only process: binds it to a GPU, watches each case, keeps a journal.

A process that a case has broken ends while that case is still the one that runs, so that no other is blamed for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from refgrid.dataset.case import Case
from refgrid.dataset.memory import share_of_gpu
from refgrid.proving.deaths import cuda_fault, told_loss
from refgrid.records.record import Outcome, Verdict, now
from refgrid.running.budget import told_duration
from refgrid.running.devices import Device, DeviceError, told_devices, visible_devices
from refgrid.running.journal import Journal, death
from refgrid.running.lease import Lease, LeaseError, this_process, told_holders, try_lease
from refgrid.running.replay import replay_command
from refgrid.running.units import Unit, bytes_of, unit_of
from refgrid.running.watch import named, watched

if TYPE_CHECKING:
    from refgrid.running.grid import Grid

JOURNALS = "refgrid_journals"  # in xdist's workerinput: the folder of this run's journals
POISONED = 70  # the status of a worker that has ended itself because its CUDA context is lost

_POLL_SECONDS = 0.5


class WaitingForGpu(UserWarning):
    """A process waits for a lease; pytest carries the message from a worker to the controller."""


class NoLease(UserWarning):
    """A process got no lease: its worker's name, and the reason."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class Worker:
    """The plugin of a process that runs cases."""

    def __init__(
        self,
        config: pytest.Config,
        grid: Grid,
        stopped: Callable[[str], None] | None = None,
        close: Callable[[Outcome], None] | None = None,
    ) -> None:
        """`stopped` is told why the rest will not run, `close` an outcome; None where a controller does all that."""
        self._config, self._grid, self._stopped, self._close = config, grid, stopped, close
        self._input: dict[str, Any] = getattr(config, "workerinput", {})
        self._name = self._input.get("workerid", "main")
        self._limit = cast(int, config.getoption("--case-timeout"))
        # As it is before pytest captures it: a process without a controller tells its end to whoever looks on.
        self._stderr = None if self._input else os.fdopen(os.dup(2), "w")
        self._lease: Lease | None = None
        self._journal: Journal | None = None
        self._alone: Unit | None = None
        self._fault = ""
        self._refused = False

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Take a lease before the first case, and in xdist before work is handed out to whoever has none."""
        from refgrid.plugin import case_of

        if self._grid.leases and not self._config.option.collectonly and any(map(case_of, session.items)):
            try:
                self._lease = self._wait_for_lease()
            except (LeaseError, DeviceError) as error:
                self._refuse(str(error))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self) -> bool | None:
        """Without a lease nothing runs; xdist's controller hands out nothing then."""
        return True if self._refused and not self._input else None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        """From the journal's first word to its last the process's end is the case's."""
        from refgrid.plugin import case_of

        case = case_of(item)
        if case is None:
            return (yield)
        with self._turn(case, case_of(nextitem) if nextitem else None):
            self._opened().begin(case.id)
            with self._watched(item, case):
                done = yield
            self._opened().end()
        if self._fault:
            self._leave(item.session, case)
        return done

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """An outcome names its device; one after which the CUDA context is lost is a crash, whatever else it says."""
        report = yield
        outcome = dict(report.user_properties).get("refgrid")
        if isinstance(outcome, dict):
            outcome["device"] = self._lease.device.told if self._lease else ""
            self._fault = cuda_fault()
            if self._fault:
                self._blame(item, report, outcome)
        return report

    def pytest_unconfigure(self) -> None:
        """A worker's lease ends with its process, and so with its CUDA context; the only process may go on."""
        if self._lease and not self._input:
            self._lease.release()
        if self._stderr:
            self._stderr.close()

    @contextlib.contextmanager
    def _watched(self, item: pytest.Item, case: Case) -> Iterator[None]:
        """Whoever takes too long ends; of a worker its controller tells, the only process does so itself."""
        if self._stderr:
            cast(Any, item).runtest = named(case.id, item.runtest)
            with watched(self._limit, self._stderr, lambda words: self._hung(item, case, words)):
                yield
            return
        faulthandler.dump_traceback_later(self._limit, exit=True, file=self._opened().dump)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _hung(self, item: pytest.Item, case: Case, words: str) -> str:
        """Record the case that the only process dies in; returns what is to be said of it."""
        journal = self._opened()
        verdict, reason = self._grid.expected.revise(
            case.name, case.seed, *death(journal.entry, words, None, self._limit)
        )
        replay = f"replay: {replay_command(self._config, item.nodeid, case, 'cuda' if self._grid.leases else 'cpu')}"
        if self._close:
            self._close(Outcome(case, verdict, reason, device=journal.entry.device, report=replay))
        return f"{case.id}: {verdict.value}: {reason}\n{replay}"

    def _refuse(self, reason: str) -> None:
        self._refused = True
        self._tell(NoLease(self._name, reason))
        if self._stopped:
            self._stopped(reason)

    def _wait_for_lease(self) -> Lease | None:
        devices, limit = visible_devices(), cast(int, self._config.getoption("--lease-timeout"))
        if not devices:
            raise LeaseError("--device cuda: no GPU is visible; without one, --device cpu")
        slots, folder = self._config.getoption("--workers-per-gpu"), self._config.getoption("--lease-folder")
        holder = this_process(f"{self._config.getoption('--environment')} in {self._config.rootpath}", now())
        ends, told = time.monotonic() + limit, False
        while (lease := try_lease(devices, slots, folder, holder)) is None:
            if time.monotonic() >= ends:
                raise LeaseError(f"no GPU within {told_duration(limit)} (--lease-timeout): {_taken(devices, folder)}")
            if not told:
                self._tell(WaitingForGpu(f"{self._name} waits for a GPU. {_taken(devices, folder)}"))
                told = True
            if self._dismissed():
                return None
        _demand_no_torch(lease)
        lease.bind()
        return lease

    def _dismissed(self) -> bool:
        """Wait a little. True when xdist's controller has meanwhile ended this worker, or is itself gone."""
        interactor = next((p for p in self._config.pluginmanager.get_plugins() if hasattr(p, "handle_command")), None)
        if interactor is None:
            time.sleep(_POLL_SECONDS)
            return False
        try:
            interactor.handle_command(interactor.channel.receive(_POLL_SECONDS))
        except interactor.channel.TimeoutError:
            return False
        except EOFError:
            pass
        return True

    def _tell(self, message: Warning) -> None:
        told = warnings.WarningMessage(message, type(message), "refgrid", 0)
        given = {"warning_message": told, "when": "collect", "nodeid": "", "location": None}
        self._config.hook.pytest_warning_recorded.call_historic(kwargs=given)

    @contextlib.contextmanager
    def _turn(self, case: Case, following: Case | None) -> Iterator[None]:
        """Where workers share a GPU, a case that takes more than a share runs while no other does.

        The cases of one workload follow each other under one such turn, since their inputs stay in memory between them.
        """
        if self._lease is None or self._lease.slots == 1:
            yield
            return
        if self._alone is None:
            large = bytes_of(self._grid.dataset, case) > share_of_gpu(self._lease.device.memory, self._lease.slots)
            self._lease.begin_use(alone=large, before_waiting=self._grid.lighten)
            self._alone = unit_of(case) if large else None
        try:
            yield
        finally:
            if self._alone is None or following is None or unit_of(following) != self._alone:
                self._end_turn()

    def _end_turn(self) -> None:
        assert self._lease is not None
        if self._alone is not None and not self._fault:
            self._grid.prover.clear()  # before the others come back
        self._alone = None
        self._lease.end_use()

    def _opened(self) -> Journal:
        if self._journal is None:
            folder = Path(self._input.get(JOURNALS) or self._grid.journals)
            device = self._lease.device.told if self._lease else ""
            self._journal = Journal(folder, self._name, device, self._stderr)
        return self._journal

    def _blame(self, item: pytest.Item, report: pytest.TestReport, outcome: dict[str, Any]) -> None:
        from refgrid.plugin import case_of, colour

        case = case_of(item)
        assert case is not None
        before = f"{outcome['verdict']}: {outcome['reason']}".rstrip(": ")
        reason = told_loss(self._fault, before)
        verdict, reason = self._grid.expected.revise(case.name, case.seed, Verdict.CRASH, reason)
        outcome.update(verdict=verdict.value, reason=reason)
        colour(report, item, outcome)

    def _leave(self, session: pytest.Session, case: Case) -> None:
        """End this process, in which every later case would fail; xdist replaces it."""
        if self._stopped is None:
            os._exit(POISONED)
        session.shouldstop = why = f"{case.id} broke the CUDA context of the only process; -n 1 would replace it"
        self._stopped(why)


def share_cores() -> None:
    """Workers on one CPU share its cores instead of each taking all; torch reads this once, at import."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def _demand_no_torch(lease: Lease) -> None:
    """Torch looks at the visible GPUs once; whoever has imported it may have made it look."""
    if "torch" in sys.modules:
        lease.release()
        raise LeaseError("torch was imported before a GPU was leased, by a conftest.py or a plugin: import it in tests")


def _taken(devices: Sequence[Device], folder: Path) -> str:
    return f"Visible are {told_devices(devices)}. {told_holders(devices, folder)}"

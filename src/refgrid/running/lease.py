"""Leases: a process has a slot of a GPU for as long as it holds a lock that the kernel takes back when it dies.

Locks are flocks on files in one folder a machine, one a slot, so all runs on the machine see each other, whoever's they
are. They are never deleted: whoever waits on a deleted file waits on nothing. A slot's file says who holds it. A slot
that is free, but whose last holder neither took its name off nor is gone, still has a kernel running.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from refgrid.dataset.memory import WORKERS_ON_GPU
from refgrid.running.devices import VISIBLE, Device

# Not tempfile's own choice, which users and jobs set as they like (TMPDIR): all must meet in one folder.
FOLDER = Path("/tmp" if os.name == "posix" else tempfile.gettempdir()) / "refgrid-leases"  # noqa: S108

_MOMENT = 0.01  # seconds: a turnstile that is passed is shut for less


class LeaseError(RuntimeError):
    """No lease can be had: names the folder or the devices and the reason."""


@dataclass(frozen=True)
class Holder:
    """Who holds a slot. `born` tells a process from a later one of the same number."""

    pid: int
    born: float
    since: str
    user: str
    what: str

    @property
    def told(self) -> str:
        """In words, for whoever waits."""
        return f"leased by process {self.pid} of {self.user} since {self.since} for {self.what}"

    @property
    def gone(self) -> bool:
        """Whether the process has ended, with all that it had open."""
        try:
            process = psutil.Process(self.pid)
            another = abs(process.create_time() - self.born) > 1
            return another or bool(process.status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True


def this_process(what: str, since: str) -> Holder:
    """The process that runs this, as a holder."""
    return Holder(os.getpid(), psutil.Process().create_time(), since, _user(), what)


class Lease:
    """A slot of a device, held until `release` or the end of the process; take one with `try_lease`."""

    def __init__(self, device: Device, slots: int, lock: Lock, folder: Path) -> None:
        self.device, self.slots = device, slots
        self._lock = lock
        self._use, self._turn = Lock(folder / f"{device.uuid}.use"), Lock(folder / f"{device.uuid}.turn")
        self._before: dict[str, str | None] = {}

    def bind(self) -> None:
        """Show this process its device alone, under its UUID, and tell it how many share it."""
        self._set({VISIBLE: self.device.uuid, WORKERS_ON_GPU: str(self.slots)})

    def begin_use(self, *, alone: bool, before_waiting: Callable[[], None]) -> None:
        """Wait until a case may begin: alone, when no other one runs on the device; else, while none runs alone.

        Whoever waits for the others to end keeps the turnstile shut, so that no stream of small cases passes it by.
        `before_waiting` is called once where it stays shut or one runs alone: the device's memory is that one's then.
        """
        if self.slots > 1:
            waits = not self._turn.take() and not self._taken_soon()
            if waits:
                before_waiting()
                self._turn.take(wait=True)
            if not self._use.take(shared=not alone):
                if not waits:
                    before_waiting()
                self._use.take(wait=True, shared=not alone)
            self._turn.release()
            os.environ[WORKERS_ON_GPU] = "1" if alone else str(self.slots)

    def _taken_soon(self) -> bool:
        """Whether the turnstile was shut for a moment only, by one that passed it."""
        time.sleep(_MOMENT)
        return self._turn.take()

    def end_use(self) -> None:
        """The case has ended."""
        self._use.release()

    def release(self) -> None:
        """Give the slot back, with the name taken off: nothing of this process runs on the device any more."""
        self.end_use()
        self._lock.write("")
        self._lock.close()
        self._use.close()
        self._turn.close()
        for name, value in self._before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    def _set(self, variables: dict[str, str]) -> None:
        self._before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)


def try_lease(devices: Sequence[Device], slots: int, folder: Path, holder: Holder) -> Lease | None:
    """A free slot of the device that has the most of them free; None where all are taken.

    Raises LeaseError where the folder cannot be used.
    """
    folder = _shared(folder)
    for slot in range(slots):  # every device gets a first process before any gets a second
        for device in devices:
            with _door(device, folder):
                lock = None if _divided_otherwise(device, slots, folder) else _slot(device, slot, slots, folder)
            if lock:
                lock.write(json.dumps(asdict(holder)))
                return Lease(device, slots, lock, folder)
    return None


def holders(devices: Sequence[Device], folder: Path) -> dict[str, list[Holder]]:
    """Who holds a slot of each device, by its UUID."""
    found: dict[str, list[Holder]] = {device.uuid: [] for device in devices}
    for device in devices:
        for path in sorted(folder.glob(f"{device.uuid}.slot-*")):
            with contextlib.closing(Lock(path)) as lock:
                holder = _holder(lock)
                if holder and (not lock.take(shared=True) or not holder.gone):
                    found[device.uuid].append(holder)
    return found


def told_holders(devices: Sequence[Device], folder: Path) -> str:
    """The same in words."""
    found = holders(devices, folder)
    told = [f"{device.told}: {holder.told}" for device in devices for holder in found[device.uuid]]
    return "; ".join(told) or "taken and given back at this moment"


class Lock:
    """An flock on a file, on a descriptor that no child gets: neither by exec, which closes it, nor by fork."""

    _open: ClassVar[set[int]] = set()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _opened(path)
        Lock._open.add(self._file)

    def take(self, *, shared: bool = False, wait: bool = False) -> bool:
        """Whether it could be taken; with `wait` it always can."""
        import fcntl

        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let others have it."""
        import fcntl

        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Release it for good."""
        Lock._open.discard(self._file)
        os.close(self._file)

    def read(self) -> str:
        """The file's content."""
        return os.pread(self._file, 65536, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        """Replace the file's content."""
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, text.encode(), 0)

    @classmethod
    def _forget(cls) -> None:
        """In a forked child, whose copies would keep the locks of a parent that dies."""
        for file in cls._open:
            os.close(file)
        cls._open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Lock._forget)  # noqa: SLF001 - the class and this line are one thing


@contextlib.contextmanager
def _door(device: Device, folder: Path) -> Iterator[None]:
    """One process at a time looks at a device's slots."""
    with contextlib.closing(Lock(folder / f"{device.uuid}.door")) as lock:
        lock.take(wait=True)
        yield


def _slot(device: Device, slot: int, slots: int, folder: Path) -> Lock | None:
    lock = Lock(folder / f"{device.uuid}.slot-{slot}-of-{slots}")
    if lock.take():
        last = _holder(lock)
        if last is None or last.gone:
            return lock
    lock.close()
    return None


def _divided_otherwise(device: Device, slots: int, folder: Path) -> bool:
    """Whether a run has a slot that divides the device into another number: nobody's share would be what he thinks."""
    for path in folder.glob(f"{device.uuid}.slot-*"):
        if not path.name.endswith(f"-of-{slots}"):
            with contextlib.closing(Lock(path)) as lock:
                last = _holder(lock)
                if not lock.take(shared=True) or (last is not None and not last.gone):
                    return True
    return False


def _holder(lock: Lock) -> Holder | None:
    try:
        return Holder(**json.loads(lock.read()))
    except (ValueError, TypeError):
        return None  # nobody's, or being written at this moment


def _shared(folder: Path) -> Path:
    """The folder, usable by every user of the machine; raises LeaseError where it is not."""
    try:
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o1777)  # as /tmp itself: anybody may add a file, nobody may delete another's
    except OSError as error:
        raise LeaseError(f"{folder}: leases cannot be kept there: {error.strerror or error}") from error
    return folder


def _opened(path: Path) -> int:
    """Open, made if need be; one that is there is opened without O_CREAT, which is refused for another user's file."""
    try:
        for _ in range(50):
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            with contextlib.suppress(FileExistsError):
                _make(path)
            time.sleep(0.01)
        raise FileNotFoundError(None, "it comes and goes")
    except OSError as error:
        raise LeaseError(f"{path}: a lease cannot be taken: {error.strerror or error}") from error


def _make(path: Path) -> None:
    """Made under another name and then linked, so that nobody finds it with the rights that the umask leaves."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.touch(0o666)
    fresh.chmod(0o666)
    try:
        os.link(fresh, path)
    finally:
        fresh.unlink()


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "somebody"

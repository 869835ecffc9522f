"""Leases between real processes: one holder a slot, freed by the kernel, and turns of cases that need a whole GPU."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from refgrid.running.devices import Device
from refgrid.running.lease import Holder, Lease, LeaseError, Lock, holders, this_process, told_holders, try_lease

TWO = [Device("FAKE-0", "fake GPU", 2**34), Device("FAKE-1", "fake GPU", 2**34)]
HOLDER = """
import sys, time
from pathlib import Path
from refgrid.running.devices import Device
from refgrid.running.lease import this_process, try_lease
folder, slots, *uuids = sys.argv[1:]
devices = [Device(uuid, "fake GPU", 2**34) for uuid in uuids]
lease = try_lease(devices, int(slots), Path(folder), this_process("another run", "yesterday"))
{then}
print(lease.device.uuid if lease else "none", flush=True)
time.sleep(600)
"""


def take(folder: Path, slots: int = 1, devices: list[Device] = TWO) -> Lease | None:
    return try_lease(devices, slots, folder, this_process("this test", "now"))


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that takes a lease and holds it; it has when its first line is there."""
    started = []

    def start(slots: int = 1, *uuids: str, then: str = "") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER.replace("{then}", then), str(tmp_path), str(slots)]
        command += uuids or ("FAKE-0", "FAKE-1")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its children too, which hold the pipe open
        process.communicate(timeout=60)


def got(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def within_a_minute(what: Callable[[], bool]) -> bool:
    ends = time.monotonic() + 60
    while not (found := what()) and time.monotonic() < ends:
        time.sleep(0.02)
    return found


class TestSlots:
    def test_each_process_gets_a_device_of_its_own_and_the_next_none(self, tmp_path: Path, another: Start) -> None:
        mine = take(tmp_path)
        its = got(another())

        assert mine
        assert {mine.device.uuid, its} == {"FAKE-0", "FAKE-1"}
        assert take(tmp_path) is None

    def test_a_device_with_two_slots_gets_its_second_process_last(self, tmp_path: Path) -> None:
        taken = [take(tmp_path, 2) for _ in range(5)]

        assert [lease.device.uuid if lease else "" for lease in taken] == ["FAKE-0", "FAKE-1", "FAKE-0", "FAKE-1", ""]

    def test_a_device_is_not_shared_with_a_run_that_divides_it_otherwise(self, tmp_path: Path, another: Start) -> None:
        assert got(another(1, "FAKE-0")) == "FAKE-0"

        assert [lease.device.uuid for _ in range(3) if (lease := take(tmp_path, 2))] == ["FAKE-1", "FAKE-1"]

    @pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
    def test_the_slot_of_a_process_that_died_is_free(self, tmp_path: Path, another: Start, how: signal.Signals) -> None:
        holder = another(1, "FAKE-0")
        assert got(holder) == "FAKE-0"
        assert take(tmp_path, devices=TWO[:1]) is None

        holder.send_signal(how)
        holder.wait(60)

        assert take(tmp_path, devices=TWO[:1])

    def test_whoever_comes_next_takes_the_device_of_the_one_that_died(self, tmp_path: Path, another: Start) -> None:
        first, second = another(), another()
        died = got(first), got(second)[:0]
        first.kill()
        first.wait(60)

        mine = take(tmp_path)

        assert mine
        assert mine.device.uuid == died[0]

    def test_a_child_of_a_process_that_died_does_not_keep_its_slot(self, tmp_path: Path, another: Start) -> None:
        spawn = "import subprocess; subprocess.Popen(['sleep', '30'], close_fds=False)"
        # A child closes the lock when it has begun: the holder waits for its word, as it is killed at once.
        told = "import os; heard, say = os.pipe()"
        fork = f"{told}; os.fork() or (os.write(say, b'.'), time.sleep(30), os._exit(0)); os.read(heard, 1)"
        for then in (spawn, fork):
            holder = another(1, "FAKE-0", then=then)
            assert got(holder) == "FAKE-0"
            holder.kill()
            holder.wait(60)

            mine = take(tmp_path, devices=TWO[:1])

            assert mine
            mine.release()

    def test_a_process_without_its_lock_that_still_lives_has_not_left_the_device(
        self, tmp_path: Path, another: Start
    ) -> None:
        holder = another(1, "FAKE-0", then="lease._lock.close()")  # as one that the driver keeps from ending
        assert got(holder) == "FAKE-0"

        assert take(tmp_path, devices=TWO[:1]) is None
        assert "leased by process" in told_holders(TWO[:1], tmp_path)
        assert take(tmp_path, 2, TWO[:1]) is None

        holder.kill()
        holder.wait(60)
        assert take(tmp_path, devices=TWO[:1])

    def test_many_processes_at_once_never_share(self, another: Start) -> None:
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(lambda _: got(another(2)), range(6)))

        assert sorted(found) == ["FAKE-0", "FAKE-0", "FAKE-1", "FAKE-1", "none", "none"]

    def test_sixteen_processes_at_once_take_sixteen_devices_and_one_more_takes_none(
        self, tmp_path: Path, another: Start
    ) -> None:
        sixteen = [Device(f"FAKE-{number}", "fake GPU", 2**34) for number in range(16)]
        uuids = [device.uuid for device in sixteen]
        with ThreadPoolExecutor(17) as pool:
            found = list(pool.map(lambda _: got(another(1, *uuids)), range(17)))

        assert sorted(found) == sorted([*uuids, "none"])
        assert take(tmp_path, devices=sixteen) is None
        assert {uuid: len(held) for uuid, held in holders(sixteen, tmp_path).items()} == dict.fromkeys(uuids, 1)


class TestBinding:
    def test_a_bound_process_sees_its_device_alone_until_it_releases_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
        monkeypatch.delenv("REFGRID_WORKERS_ON_GPU", raising=False)
        lease = take(tmp_path, 3)
        assert lease

        lease.bind()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "FAKE-0"
        assert os.environ["REFGRID_WORKERS_ON_GPU"] == "3"

        lease.release()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert "REFGRID_WORKERS_ON_GPU" not in os.environ
        assert take(tmp_path, 1)


class TestHolders:
    def test_are_told_with_process_user_time_and_purpose(self, tmp_path: Path, another: Start) -> None:
        holder = another(1, "FAKE-1")
        got(holder)

        (found,) = holders(TWO, tmp_path)["FAKE-1"]

        assert (found.pid, found.since, found.what) == (holder.pid, "yesterday", "another run")
        assert told_holders(TWO, tmp_path) == f"fake GPU FAKE-1: {found.told}"
        assert f"process {holder.pid} of" in found.told

    def test_nobody_is_told_as_nobody(self, tmp_path: Path) -> None:
        lease = take(tmp_path)
        assert lease
        lease.release()

        assert holders(TWO, tmp_path) == {"FAKE-0": [], "FAKE-1": []}
        assert told_holders(TWO, tmp_path) == "taken and given back at this moment"

    def test_a_later_process_of_the_same_number_is_another(self) -> None:
        mine = this_process("this test", "now")

        assert not mine.gone
        assert Holder(mine.pid, mine.born - 100, "then", "me", "that").gone


class TestFolder:
    def test_is_there_for_every_user(self, tmp_path: Path) -> None:
        old = os.umask(0o077)
        try:
            assert take(tmp_path / "leases")
        finally:
            os.umask(old)

        assert stat.S_IMODE((tmp_path / "leases").stat().st_mode) == 0o1777
        modes = {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "leases").iterdir()}
        assert modes == {0o666}

    def test_that_is_none_is_an_error_with_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("a file")

        with pytest.raises(LeaseError, match=r"taken(/FAKE-0\.door)?: (leases|a lease) cannot be"):
            take(tmp_path / "taken")

    def test_a_lock_that_cannot_be_opened_is_an_error_with_its_name(self, tmp_path: Path) -> None:
        (tmp_path / "FAKE-0.door").symlink_to(tmp_path / "elsewhere")

        with pytest.raises(LeaseError, match=r"FAKE-0\.door: a lease cannot be taken"):
            take(tmp_path)


TURN = """
import sys, time
from pathlib import Path
from refgrid.running.devices import Device
from refgrid.running.lease import this_process, try_lease
folder, alone = Path(sys.argv[1]), sys.argv[2] == "alone"
lease = try_lease([Device("FAKE-0", "fake GPU", 2**34)], 3, folder, this_process("a turn", "now"))
lease.begin_use(alone=alone, before_waiting=lambda: print("waits", flush=True))
print("began", flush=True)
sys.stdin.readline()
lease.end_use()
print("ended", flush=True)
sys.stdin.readline()
"""


class TestTurns:
    """Three processes on one device."""

    @pytest.fixture
    def process(self, tmp_path: Path) -> Iterator[Start]:
        started = []

        def start(kind: str) -> subprocess.Popen[str]:
            command = [sys.executable, "-c", TURN, str(tmp_path), kind]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            return started[-1]

        yield start
        for process in started:
            process.kill()
            process.communicate(timeout=60)

    @staticmethod
    def state(folder: Path, name: str) -> str:
        """Of a lock, as another process finds it: free, shared or taken."""
        lock = Lock(folder / f"FAKE-0.{name}")
        try:
            return "free" if lock.take() else "shared" if lock.take(shared=True) else "taken"
        finally:
            lock.close()

    @staticmethod
    def go_on(process: subprocess.Popen[str]) -> None:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()

    def test_small_cases_run_side_by_side(self, tmp_path: Path, process: Start) -> None:
        assert [got(process("small")), got(process("small"))] == ["began", "began"]
        assert self.state(tmp_path, "use") == "shared"

    def test_a_large_case_waits_for_the_small_ones_and_lets_no_later_one_pass(
        self, tmp_path: Path, process: Start
    ) -> None:
        small = process("small")
        got(small)
        large = process("alone")
        assert within_a_minute(lambda: self.state(tmp_path, "turn") == "taken")  # it waits behind a shut turnstile
        late = process("small")
        assert got(late) == "waits"  # and gives up what memory it holds
        assert self.state(tmp_path, "use") == "shared"

        self.go_on(small)
        assert [got(large), got(large)] == ["waits", "began"]
        assert self.state(tmp_path, "use") == "taken"
        self.go_on(large)
        assert got(late) == "began"

    def test_whoever_comes_while_a_large_case_runs_gives_up_memory_before_it_waits(self, process: Start) -> None:
        large = process("alone")
        assert got(large) == "began"
        late = process("small")

        assert got(late) == "waits"
        self.go_on(large)
        assert got(late) == "began"

    def test_a_turnstile_that_another_passes_is_no_reason_to_give_up_memory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lease = try_lease([Device("FAKE-0", "fake GPU", 2**34)], 3, tmp_path, this_process("a turn", "now"))
        assert lease
        passing = Lock(tmp_path / "FAKE-0.turn")
        assert passing.take()
        monkeypatch.setattr("refgrid.running.lease.time.sleep", lambda _: passing.release())

        lease.begin_use(alone=False, before_waiting=pytest.fail)

        assert self.state(tmp_path, "use") == "shared"
        lease.release()
        passing.close()

    @pytest.mark.parametrize("waiting", [False, True])
    def test_a_large_case_that_dies_frees_the_device(self, tmp_path: Path, process: Start, waiting: bool) -> None:
        if waiting:
            small = process("small")
            got(small)
        large = process("alone")
        if waiting:
            assert within_a_minute(lambda: self.state(tmp_path, "turn") == "taken")
        else:
            assert got(large) == "began"

        large.kill()

        assert got(process("small")) == "began"

    def test_a_lone_process_needs_no_turn(self, tmp_path: Path) -> None:
        lease = take(tmp_path)
        assert lease

        lease.begin_use(alone=True, before_waiting=pytest.fail)

        assert self.state(tmp_path, "use") == "free"

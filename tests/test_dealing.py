"""Tasks dealt to devices: in their order, within memory, processes and time, each process on its own device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from dealt_pieces import Piece, killed, noted

from refgrid.running import dealing
from refgrid.running.dealing import CPU, DealingError, dealt, rooms
from refgrid.running.devices import FAKE, VISIBLE


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "running").mkdir()
    return tmp_path / "running"


def test_every_task_is_done_once_the_first_begins_and_none_beside_what_leaves_no_room(folder: Path) -> None:
    pieces = [Piece(name, need, folder) for name, need in (("b", 9), ("c", 6), ("d", 5), ("a", 1))]

    results = list(dealt(pieces, noted, {CPU: 10}, 4))

    assert sorted(name for name, _, _ in results) == ["a", "b", "c", "d"]
    ran_beside = {name: beside for name, _, beside in results}
    assert ran_beside["b"] == []
    assert "b" not in ran_beside["c"] + ran_beside["d"]
    assert "c" not in ran_beside["d"]


def test_what_fits_runs_at_once(folder: Path) -> None:
    pieces = [Piece(name, 3, folder, wants=3) for name in "abc"]  # each waits for the other two

    assert len(list(dealt(pieces, noted, {CPU: 10}, 3))) == 3


def test_what_fits_nowhere_runs_alone_instead_of_never(folder: Path) -> None:
    pieces = [Piece("huge", 99, folder), Piece("small", 1, folder)]

    results = {name: beside for name, _, beside in dealt(pieces, noted, {CPU: 10}, 2)}

    assert results == {"huge": [], "small": []}


def test_when_time_is_up_what_runs_is_done_and_what_had_no_turn_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, done = [0.0], list[str]()
    monkeypatch.setattr(dealing, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    pieces = [Piece(name, 1, folder) for name in ("a", "b", "moe", "moe", "gdn")]

    def one_after_which_time_is_up() -> Iterator[str]:
        for name, _, _ in dealt(pieces, noted, {CPU: 10}, 2, ends=1.0):
            clock[0] = 1.0
            yield name

    with pytest.raises(DealingError, match=r"^time was up before all of moe, gdn$"):
        done.extend(one_after_which_time_is_up())

    assert sorted(done) == ["a", "b"]


def test_processes_stay_on_their_device_and_all_devices_are_used(folder: Path) -> None:
    pieces = [Piece(name, 6, folder, wants=2) for name in "ab"]  # no device holds both

    found = {device for _, device, _ in dealt(pieces, noted, {"GPU-1": 10, "GPU-2": 10}, 2)}

    assert found == {"GPU-1", "GPU-2"}


def test_a_process_that_dies_ends_it_and_says_what_ran(folder: Path) -> None:
    with pytest.raises(DealingError, match=r"a process on the CPU died; there ran, .*: moe \(2\.0 GiB\)"):
        list(dealt([Piece("moe", 2**31, folder)], killed, {CPU: 1}, 1))


def test_rooms_are_the_visible_gpus_without_what_cuda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE, "GPU-a:10GiB,GPU-b:20GiB")
    monkeypatch.setenv(VISIBLE, "GPU-b")

    assert rooms("cuda") == {"GPU-b": pytest.approx(18 * 2**30)}


def test_without_a_gpu_none_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dealing, "visible_devices", lambda: ())

    with pytest.raises(DealingError, match="no GPU is visible"):
        rooms("cuda")
    assert list(rooms("cpu")) == [CPU]

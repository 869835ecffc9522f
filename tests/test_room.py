"""How much of a device's memory a worker is sure of, by the number of workers that share it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from refgrid.caching.room import had_all, is_lack, sure_room
from refgrid.dataset import memory
from refgrid.running.devices import FAKE, VISIBLE

GIB = 2.0**30


@pytest.fixture(autouse=True)
def _h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE, "a:140GiB,b:140GiB")
    monkeypatch.delenv(VISIBLE, raising=False)


@pytest.mark.parametrize(
    ("workers", "gib"), [pytest.param(1, 120.6, id="one"), pytest.param(10, 72.0, id="ten, which hold 6 GiB each")]
)
def test_what_other_workers_may_hold_is_not_counted_on(workers: int, gib: float) -> None:
    assert sure_room("cuda", math.inf, workers) == pytest.approx(gib * GIB)


def test_of_a_small_gpu_each_of_many_workers_is_sure_of_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE, "a:24GiB")

    assert sure_room("cuda", math.inf, 5) == pytest.approx(24 / 6 * 0.9 * GIB)


def test_of_unequal_gpus_the_largest_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAKE, "a:24GiB,b:140GiB")

    assert sure_room("cuda", math.inf, 1) == pytest.approx(120.6 * GIB)


def test_a_bound_that_was_set_counts_where_it_is_less() -> None:
    assert sure_room("cuda", 2 * GIB, 1) == 2 * GIB
    assert sure_room("cpu", 2 * GIB, 1) == 2 * GIB


def test_without_a_bound_or_a_gpu_that_tells_nobody_is_sure_of_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sure_room("cpu", math.inf, 1) == math.inf
    monkeypatch.setenv(VISIBLE, "7")
    assert sure_room("cuda", math.inf, 1) == math.inf
    assert not had_all("nothing fits; 92.3 GiB are free for this worker", math.inf)


def test_reasons_are_read_as_the_instrument_words_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "weight_bytes", lambda _: 60 * GIB)
    monkeypatch.setattr(memory, "bytes_laid_out_anew", lambda *_: 190 * GIB)
    anything: Any = None

    for reason in (
        memory.told_lack(anything, 92.3 * GIB),
        memory.told_lack(anything, 2e11),
        memory.told_lack_for("sglang", anything, {}, 92.3 * GIB),
    ):
        assert is_lack(reason), reason
        assert had_all(reason, 92 * GIB), reason
        assert not had_all(reason, 190 * GIB), reason
    assert not is_lack("the budget of 20m was spent")
    assert not had_all("the budget of 20m was spent", GIB)

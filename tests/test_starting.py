"""Workers start side by side. Real ones are in test_fleet and test_faults."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest

from refgrid.running.starting import start_at_once


def specs(count: int) -> list[Any]:
    return [SimpleNamespace(id=f"gw{number}") for number in range(count)]


class Group:
    """Whose gateways are names; each is made only when so many are being made at once."""

    def __init__(self, together: int, patience: float = 30.0) -> None:
        self._all_there = threading.Barrier(together, timeout=patience)
        self.asked: list[str] = []

    def makegateway(self, spec: Any) -> str:
        self.asked.append(spec.id)
        self._all_there.wait()
        return f"gateway of {spec.id}"


@pytest.mark.parametrize("count", [4, 16])
def test_all_start_together_and_each_is_handed_out_by_its_name(count: int) -> None:
    group, wanted = Group(count), specs(count)

    start_at_once(cast(Any, group), wanted)

    assert [group.makegateway(spec) for spec in wanted] == [f"gateway of gw{number}" for number in range(count)]
    assert sorted(group.asked) == sorted(f"gw{number}" for number in range(count))


def test_one_after_the_other_would_be_noticed() -> None:
    with pytest.raises(threading.BrokenBarrierError):
        Group(2, patience=0.1).makegateway(specs(1)[0])


def test_one_that_replaces_another_is_made_anew() -> None:
    group = Group(1)
    start_at_once(cast(Any, group), specs(1))

    assert group.makegateway(SimpleNamespace(id="gw7")) == "gateway of gw7"
    assert group.asked == ["gw0", "gw7"]


def test_what_keeps_one_from_starting_is_told() -> None:
    def fail(spec: Any) -> None:
        raise OSError(f"no process for {spec.id}")

    with pytest.raises(OSError, match="no process for gw0"):
        start_at_once(cast(Any, SimpleNamespace(makegateway=fail)), specs(1))

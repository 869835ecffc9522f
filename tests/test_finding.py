"""What is told of an error, and that it keeps nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest

from refgrid.proving.finding import forget_locals, judge
from refgrid.records.record import Verdict


class Large:
    """Stands for a tensor of gigabytes."""


def raising(held: list[weakref.ref[Large]]) -> None:
    large = Large()
    held.append(weakref.ref(large))
    try:
        deeper(large)
    except KeyError as cause:
        raise ValueError("declined") from cause


def deeper(large: Large) -> None:
    raise KeyError(repr(large))


def test_memory_that_python_does_not_get_is_out_of_memory() -> None:
    with pytest.raises(MemoryError) as raised:  # torch's own allocators are refused in test_faults.py and on a GPU
        bytearray(2**62)

    assert judge(raised.value)[0] is Verdict.OOM


def test_another_error_of_the_same_kind_is_not_out_of_memory() -> None:
    assert judge(RuntimeError("the size of tensor a must match"))[0] is Verdict.ERROR


@pytest.mark.parametrize("forgotten", [True, False])
def test_an_error_that_is_kept_holds_what_its_frames_held_unless_that_is_forgotten(*, forgotten: bool) -> None:
    held: list[weakref.ref[Large]] = []
    gc.disable()
    try:
        with pytest.raises(ValueError, match="declined") as raised:
            raising(held)
        if forgotten:
            forget_locals(raised.value)
        assert (held[0]() is None) == forgotten
    finally:
        gc.enable()
    assert [entry.name for entry in raised.traceback][-1] == "raising"

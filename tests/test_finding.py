"""What is told of an error, and that it keeps nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest

from refgrid.proving.finding import forget_locals


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

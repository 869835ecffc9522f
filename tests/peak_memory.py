"""How much memory a call takes at its peak, counted by PyTorch's own allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that `call` holds at once beyond what was held before, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = call()
    del result
    held = peak = 0
    for size in _allocations(recorded):
        held += size
        peak = max(peak, held)
    return peak


def _allocations(recorded: Any) -> Iterator[int]:
    """Bytes of each allocation, negative for what was given back, in order of time."""
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    return (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))

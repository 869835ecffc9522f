"""How much work a plan is, for as many groups: counted, as time would be the machine's and not the plan's.

Needs torch only, and runs on any device. Time is what `python -m grouped_bench` prints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from grouped_layouts import Subject, planned, zigzag
from torch.utils._python_dispatch import TorchDispatchMode

# By backend, of two or three microseconds each: a plan is to take half a millisecond.
_MOST_OPERATIONS = {"reference": 0, "fa3": 12, "torch": 12, "triton": 12}
# Lines of Python for each slice more: what is left after NumPy and the built-in functions that take all at once.
_MOST_STEPS = {"reference": 4, "fa3": 25, "torch": 22, "triton": 4}


class _Counted(TorchDispatchMode):
    """Operations of torch, whatever they do."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        self.operations += 1
        return func(*args, **(kwargs or {}))


def check_planning(subject: Subject) -> None:
    """As many operations of torch for 128 slices as for 32, and not many; few steps of Python a slice, and no more."""
    plans = [_planning(groups, subject) for groups in (16, 32, 64)]
    for plan in plans:
        plan()  # what is imported or kept at a first call
    operations = [_operations(plan) for plan in plans]
    few, some, many = (_steps(plan) for plan in plans)

    assert len(set(operations)) == 1, f"operations of torch for 32, 64 and 128 slices: {operations}"
    assert operations[0] <= _MOST_OPERATIONS[subject.backend], f"{operations[0]} operations of torch"
    told = f"steps of Python for 32, 64 and 128 slices: {few}, {some}, {many}"
    assert many - some <= 2.1 * (some - few), told
    assert some - few <= 32 * _MOST_STEPS[subject.backend], told


def _planning(groups: int, subject: Subject) -> Callable[[], object]:
    layout = zigzag([2048] * groups, 3, 8)
    return lambda: planned(layout, subject, backend=subject.backend)


def _operations(call: Callable[[], object]) -> int:
    counted = _Counted()
    with counted:
        call()
    return counted.operations


def _steps(call: Callable[[], object]) -> int:
    """Lines of Python, each as often as it runs."""
    steps = 0

    def trace(_frame: Any, event: str, _told: Any) -> Any:
        nonlocal steps
        steps += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return steps

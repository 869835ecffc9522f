"""Deals tasks to devices, in their order: on each at once as many as it has processes, and memory, for."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Protocol, TypeVar

from refgrid.dataset.memory import bytes_free, share_of_gpu, told_bytes
from refgrid.running.devices import VISIBLE, visible_devices

CPU = ""  # in place of a GPU's UUID

Result = TypeVar("Result")


class Task(Protocol):
    """What can be dealt."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def need(self) -> float:
        """Bytes of the device's memory at its peak."""


Work = TypeVar("Work", bound=Task)


class DealingError(RuntimeError):
    """There is no device, a process died, or time was short: names what was being worked on, or had no turn."""


def rooms(device: str) -> dict[str, float]:
    """Bytes of memory that tasks may take of each visible GPU, by UUID, or of this machine.

    Raises DealingError when a GPU is asked for and none is visible.
    """
    if device == "cpu":
        return {CPU: bytes_free("cpu")}
    found = {each.uuid: share_of_gpu(each.memory, workers=1) for each in visible_devices()}
    if not found:
        raise DealingError("no GPU is visible here; nvidia-smi lists those of the machine")
    return found


def dealt(
    tasks: Sequence[Work],
    work: Callable[[Work], Result],
    room: Mapping[str, float],
    processes: int,
    ends: float = math.inf,
) -> Iterator[Result]:
    """What `work` gives for each task, as soon as it is done; a device that is idle takes even what does not fit.

    `work` and the tasks can be pickled; `processes` in all, a device has one at least. From `ends` on, of
    time.monotonic(), none begins. Raises what `work` raises, and DealingError when a process dies or, when all that had
    begun is done, for tasks that had no turn.
    """
    each = max(1, processes // len(room))
    waiting = list(tasks)
    running: dict[Future[Result], tuple[str, Work]] = {}
    with ExitStack() as stack:
        pools = {device: stack.enter_context(_pool(device, each)) for device in room}
        while running or (waiting and time.monotonic() < ends):
            for task in list(waiting) if time.monotonic() < ends else ():
                if (device := _device_for(task, room, running.values(), each)) is not None:
                    running[pools[device].submit(work, task)] = device, task
                    waiting.remove(task)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                try:
                    yield done.result()
                except BrokenProcessPool as error:
                    raise _died(running[done][0], running.values()) from error
                del running[done]
    if waiting:
        raise DealingError(f"time was up before all of {', '.join(dict.fromkeys(task.name for task in waiting))}")


def _died(device: str, running: Iterable[tuple[str, Task]]) -> DealingError:
    """Which process of a pool died nobody tells, so all tasks of its device are named."""
    names = ", ".join(f"{task.name} ({told_bytes(task.need)})" for where, task in running if where == device)
    return DealingError(f"a process on {device or 'the CPU'} died; there ran, with what each needs: {names}")


def _pool(device: str, processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_stay_on, initargs=(device,))


def _stay_on(device: str) -> None:
    """Of the process: before anything imports torch."""
    if device != CPU:
        os.environ[VISIBLE] = device


def _device_for(task: Task, room: Mapping[str, float], running: Iterable[tuple[str, Task]], each: int) -> str | None:
    """The one with most memory left, of those with a process to spare and room for the task, or nothing to do."""
    left, count = dict(room), dict.fromkeys(room, 0)
    for device, other in running:
        left[device] -= other.need
        count[device] += 1
    able = [device for device in room if count[device] < each and (task.need <= left[device] or not count[device])]
    return max(able, key=left.__getitem__, default=None)

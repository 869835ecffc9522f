"""Processes that do one call after another, any of which may be their end: the death is told, and a new one goes on.

The standard library's pools do not say in which call a process died, nor how: multiprocessing's waits for ever, that of
concurrent.futures gives up all of its calls. Calls that share what their process has prepared must meet in one process,
too, which no pool promises.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from refgrid.proving.deaths import cuda_fault, innermost_frame, is_timeout, told_death, told_loss
from refgrid.records.record import Verdict

# Of a process whose pipe has broken: it is gone, or in a driver call that ends when its kernel does.
_REAP_SECONDS = 10

Task = TypeVar("Task")
Found = TypeVar("Found")


class Died(Exception):
    """A call was the end of its process, or of the process's CUDA context; `verdict` is crash, hang or oom.

    It is oom for a SIGKILL, which no fault sends itself: the kernel sends it when memory runs out, to whom it chooses.
    That proves nothing about the call.
    """

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict, self.reason = verdict, reason


class Failed(RuntimeError):
    """What a call raised, with the traceback of its process."""


class Worker:
    """Calls a function in a process of its own, which starts with the first call, and anew after each death."""

    def __init__(self, function: Callable[..., Any], limit: int) -> None:
        """`function` stands at the top of a module; a call that takes more than `limit` seconds is a hang."""
        self._function, self._limit = function, limit
        self._process: BaseProcess | None = None
        self._closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="refgrid-mutants-")
        self._words = Path(self._folder.name, "words")

    def call(self, *given: Any) -> Any:
        """What the function returns.

        Raises Died where the call kills its process, hangs, or loses the CUDA context, and Failed for what it raises.
        """
        self._send(given)
        try:
            found, raised, fault = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise self._death() from None
        if fault:
            self._end()
            raise Died(Verdict.CRASH, told_loss(fault))
        if raised:
            raise Failed(raised)
        return found

    def close(self) -> None:
        """End the process, also in the middle of a call, which then raises; there is no other after it."""
        self._closed = True
        self._end()
        self._folder.cleanup()

    def _send(self, given: Sequence[Any]) -> None:
        """A process that has ended after its last answer is not this call's fault."""
        if self._process is None:
            self._start()
        try:
            self._pipe.send(given)
        except ConnectionError:
            self._end()
            self._start()
            self._pipe.send(given)

    def _start(self) -> None:
        if self._closed:
            raise Failed("no call comes after the end")
        context = multiprocessing.get_context("spawn")  # a CUDA context does not survive a fork
        self._pipe, theirs = context.Pipe()
        told = (theirs, self._words, self._function, self._limit)
        self._process = context.Process(target=_serve, args=told, daemon=True)
        self._process.start()
        theirs.close()  # or the pipe would not end with the process
        try:
            self._main_thread = self._pipe.recv()
        except EOFError:
            raise Failed("a process ended before its first call; what it said stands above") from None

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.join(_REAP_SECONDS)

    def _death(self) -> Died | Failed:
        process = self._process
        if self._closed or process is None:
            return Failed("the call was cut short")
        process.join(_REAP_SECONDS)
        status, words = process.exitcode, self._words.read_text(errors="replace")
        self._end()
        frame = innermost_frame(words, self._main_thread)
        where = f" in {frame}" if frame else ""
        if is_timeout(words):
            return Died(Verdict.HANG, f"not done within {self._limit} s (--timeout), then{where}")
        verdict = Verdict.OOM if status == -signal.SIGKILL else Verdict.CRASH
        return Died(verdict, f"the process died: {told_death(status, words)}{where}")


def spread(
    todo: Sequence[Task], do: Callable[[Worker, Task], Found], workers: Sequence[Worker]
) -> Iterator[tuple[Task, Found]]:
    """Do every task with a worker that meanwhile serves no other; yields what each found as soon as it is done.

    Closes the workers; raises what a task raises.
    """
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def done(task: Task) -> tuple[Task, Found]:
        worker = idle.get()
        try:
            return task, do(worker, task)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            yield from (each.result() for each in as_completed([pool.submit(done, task) for task in todo]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()


def _serve(pipe: Connection, words: Path, function: Callable[..., Any], limit: int) -> None:
    """The life of the process: `words` is the file that says how it ended."""
    with words.open("w") as file, suppress(EOFError):  # until the other side has gone
        faulthandler.enable(file)
        pipe.send(threading.main_thread().ident)
        while True:
            given = pipe.recv()
            faulthandler.dump_traceback_later(limit, exit=True, file=file)
            answer = _answer(function, given)
            faulthandler.cancel_dump_traceback_later()
            pipe.send(answer)


def _answer(function: Callable[..., Any], given: Sequence[Any]) -> tuple[Any, str, str]:
    """What the call returned or raised, and CUDA's words if the context is lost: errors of a GPU come late."""
    found, raised = None, ""
    try:
        found = function(*given)
    except Exception:  # noqa: BLE001 - carried to who asked
        raised = traceback.format_exc()
    return found, raised, cuda_fault()

"""The watch over a case in the only process of a run, which nobody outlives to tell: it does so itself, then ends.

A thread names the case, says where it is and has it recorded as a `hang`, so that the run, when it goes on, goes on
behind it. An endless call that never lets another thread have Python's lock is ended a little later by faulthandler,
which needs no lock and can only say which functions run: one of them bears the name of the case. Nothing is recorded
then, and the case runs anew as that of any killed run does.
"""

from __future__ import annotations

import faulthandler
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from tempfile import TemporaryFile
from types import FunctionType
from typing import TextIO

GRACE = 10  # seconds from the thread's turn until faulthandler's

Told = Callable[[str], str]


@contextmanager
def watched(limit: int, stderr: TextIO, told: Told) -> Iterator[None]:
    """End the process when the block takes longer than so many seconds.

    `told` is given where all threads are, in faulthandler's words, records it, and returns what to write before.
    """
    turn, over = threading.Lock(), threading.Event()

    def end() -> None:
        with turn:  # held to the end: a case that is done meanwhile waits here
            if not over.is_set():
                words = f"Timeout ({timedelta(seconds=limit)})!\n{_stacks()}"
                stderr.write(f"\n{told(words)}\n\n{words}")
                stderr.flush()
                os._exit(1)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    faulthandler.dump_traceback_later(limit + GRACE, exit=True, file=stderr)
    try:
        yield
    finally:
        timer.cancel()
        with turn:
            over.set()
        faulthandler.cancel_dump_traceback_later()


def _stacks() -> str:
    """Of all threads alike: this one has done nothing wrong."""
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().replace("Current thread 0x", "Thread 0x")


def named(name: str, call: Callable[[], None]) -> Callable[[], None]:
    """The same, in a function of this name, which every traceback shows."""

    def run() -> None:
        call()

    code = run.__code__.replace(co_filename=f"<case {name}>", co_name="run, and it has not ended")
    return FunctionType(code, run.__globals__, run.__name__, closure=run.__closure__)

"""Ways in which a process ends, or loses its CUDA context, for tests that make it happen in a process of their own."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LOST = "CUDA error: device-side assert triggered"


def _exit() -> None:
    os._exit(3)


def _killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _astray() -> None:
    ctypes.string_at(0)


def _endless() -> None:
    while True:
        pass


def _lost_late() -> None:
    """As after a device-side assert: the call that causes it returns, and the next that waits for the GPU raises."""
    torch: Any = sys.modules.setdefault("torch", SimpleNamespace(cuda=SimpleNamespace()))  # type: ignore[arg-type]  # a name is enough
    torch.cuda.is_initialized = lambda: True
    torch.cuda.synchronize = _raise


def _lost() -> None:
    _lost_late()
    _raise()


def _raise() -> None:
    raise RuntimeError(f"{LOST}\nCompile with `TORCH_USE_CUDA_DSA`")


def _later() -> None:
    """Returns, and ends the process then."""
    threading.Timer(0.05, os._exit, [0]).start()


WAYS: dict[str, Callable[[], Any]] = {
    "exit": _exit,
    "SIGKILL": _killed,
    "SIGSEGV": _astray,
    "SIGABRT": os.abort,
    "endless": _endless,
    "lost late": _lost_late,
    "lost": _lost,
    "later": _later,
    "pid": os.getpid,
    "raise": _raise,
}


def do(way: str) -> Any:
    """Do one of them."""
    return WAYS[way]()


def once(mark: str, way: str) -> None:
    """Do it unless the file that marks it as done is there, so that the process after the next does not."""
    if not Path(mark).exists():
        Path(mark).touch()
        do(way)

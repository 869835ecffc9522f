"""How a process in which cases run comes to its end: by a lost CUDA context, a signal, a status, or out of time."""

from __future__ import annotations

import re
import signal
import sys

from refgrid.proving.finding import judge
from refgrid.records.record import Verdict

_FRAME = re.compile(r'  File "(?P<file>.+)", line (?P<line>\d+) in (?P<function>.+)')


def cuda_fault() -> str:
    """CUDA's words if nothing can run in this process any more; nothing where CUDA was not used."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").item()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is no case's own
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return "" if judge(error)[0] is Verdict.OOM else lines[0]
    return ""


def told_loss(fault: str, before: str = "") -> str:
    """The words for a lost context; `before` is what was found until then."""
    return f"the CUDA context is lost after it: {fault}" + (f" ({before})" if before else "")


def is_timeout(words: str) -> bool:
    """Whether faulthandler ended the process because its time was over."""
    return words.startswith("Timeout (")


def innermost_frame(words: str, main_thread: int) -> str:
    """Where the main thread was, or else the one that died: function, file and line."""
    stacks = re.split(r"^(?=(?:Current thread|Thread) 0x)", words, flags=re.MULTILINE)[1:]
    heads = ("Current thread 0x", f"Thread 0x{main_thread:016x}")
    told = [stack for head in heads for stack in stacks if stack.startswith(head)]
    found = _FRAME.search(told[0]) if told else None
    return f"{found['function']} at {found['file']}:{found['line']}" if found else ""


def told_death(status: int | None, words: str) -> str:
    """How a process ended, by its status as subprocess gives it and by what faulthandler wrote."""
    if status is not None and status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        return f"killed by {name}" + (", as the kernel does when memory runs out" if name == "SIGKILL" else "")
    if words.startswith("Fatal Python error: "):
        return words.splitlines()[0].removeprefix("Fatal Python error: ")
    return "ended without a word" if status is None else f"ended with status {status}"

"""Ranks as processes of this machine. Who dies fails the test with its words; who hangs is killed.

Those that talk by Gloo are forked off a server that has imported torch already, so a rank starts in a fraction of a
second. Others are started by torchrun.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

import psutil

# Seconds in which those whom a death leaves without an answer may say so.
_LAST_WORDS = 1.0


def run_processes(world_size: int, target: Callable[..., None], *told: Any, limit: float = 120) -> None:
    """Call target(rank, world_size, *told) in a process for each rank, in a default group of Gloo.

    target: a function at the top of a module in tests/. AssertionError with the ranks' own words if one fails, dies or
    has not ended within limit seconds.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "refgrid_solutions.grouped_attention"])
    with TemporaryDirectory() as folder:
        asked = [(rank, world_size, folder, limit, target, told) for rank in range(world_size)]
        ranks = [context.Process(target=_rank, args=each, name=f"rank {each[0]} of {world_size}") for each in asked]
        for process in ranks:
            process.start()
        try:
            _watch(ranks, Path(folder), time.monotonic() + limit, limit)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def torchrun(script: Path, world_size: int, *told: str, limit: float = 120) -> str:
    """What the script prints under torchrun on this machine; the ranks' own words if it fails or takes too long."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    with TemporaryFile("w+") as words:
        everything = [*command, str(script), *told]
        # The ranks import what this process can.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with subprocess.Popen(everything, stdout=words, stderr=subprocess.STDOUT, env=environment) as launcher:
            try:
                status: int | str = launcher.wait(limit)
            except subprocess.TimeoutExpired:
                status = f"nothing within {limit:g} s, so it was killed"
            finally:
                _end(launcher.pid)
        words.seek(0)
        said = words.read()
    if status != 0:
        raise AssertionError(f"torchrun of {world_size} ranks of {script.name} ended with {status}\n{said}")
    return said


def _end(launcher: int) -> None:
    """It and its ranks, which have sessions of their own, if they still run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for each in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()


def _rank(rank: int, world_size: int, folder: str, limit: float, target: Callable[..., None], told: Any) -> None:
    """The life of one process; what it says goes to a file."""
    words = os.open(Path(folder, str(rank)), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(words, stream.fileno())
    faulthandler.enable(words)
    faulthandler.dump_traceback_later(0.8 * limit, file=words)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # a machine's own name need not lead back to it

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, timedelta(seconds=limit), world_size, rank)
    target(rank, world_size, *told)
    if dist.is_initialized():
        dist.destroy_process_group()


def _watch(ranks: Sequence[BaseProcess], folder: Path, deadline: float, limit: float) -> None:
    """Until all have ended well; AssertionError otherwise."""
    running = list(ranks)
    while running:
        connection.wait([process.sentinel for process in running], deadline - time.monotonic())
        ended = [process for process in running if not process.is_alive()]
        if failed := [process for process in ended if process.exitcode]:
            connection.wait([process.sentinel for process in running if process not in ended], _LAST_WORDS)
            raise AssertionError("\n".join(_obituary(process, ranks, folder) for process in failed))
        running = [process for process in running if process not in ended]
        if running and time.monotonic() >= deadline:
            late = "\n".join(_said(process, ranks, folder) for process in running)
            names = ", ".join(process.name for process in running)
            raise AssertionError(f"not ended within {limit:g} s, so killed: {names}\n{late}")


def _obituary(process: BaseProcess, ranks: Sequence[BaseProcess], folder: Path) -> str:
    return f"{process.name} ended with exit code {process.exitcode}\n{_said(process, ranks, folder)}"


def _said(process: BaseProcess, ranks: Sequence[BaseProcess], folder: Path) -> str:
    file = folder / str(list(ranks).index(process))
    text = file.read_text(errors="replace").strip() if file.exists() else ""
    return f"{process.name} said: {text or 'nothing'}"

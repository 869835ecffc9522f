"""What ranks do that are processes: functions that a process can import, of tests/solutions/test_zigzag_gloo.py."""

from __future__ import annotations

import os
import runpy
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from zigzag_checks import Case, drawn, expected, hold, run_rank

STRIDES = (1, 2)
DTYPES = (torch.float64, torch.bfloat16)


def nothing(*_: int) -> None:
    """But to be there."""


def attends(rank: int, world_size: int) -> None:
    """Forward and backward, several sequences, heads of q that share those of k; each rank holds its own part."""
    for dtype in DTYPES:
        for stride in STRIDES:
            case = Case([2 * world_size * chunk for chunk in (3, 1, 0, 4)], stride=stride, dtype=dtype, head_dim=16)
            told = drawn(case)
            should = expected(case, told, rank, world_size)
            for grouped in (True, False):
                hold(case, run_rank(case._replace(grouped=grouped), told, None, rank, world_size), should)


def attends_in_a_subgroup(rank: int, world_size: int) -> None:
    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    case = Case([8, 24])
    told = drawn(case)
    found = run_rank(case, told, halves[rank % 2], rank // 2, world_size // 2)
    hold(case, found, expected(case, told, rank // 2, world_size // 2))


def is_wrong(rank: int, world_size: int) -> None:
    case = Case([8])
    told = drawn(case)
    found = run_rank(case, told, None, rank, world_size)
    damaged = found[3] * (1 + 1e-9 * (rank == 1))
    hold(case, (*found[:3], damaged, found[4]), expected(case, told, rank, world_size))


def dies(rank: int, world_size: int) -> None:
    if rank == 1:
        sys.stderr.write(f"the last words of one of {world_size}\n")
        sys.stderr.flush()
        os._exit(7)
    dist.barrier()


def hangs(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        time.sleep(600)


def runs_the_program_of_gpus(rank: int, world_size: int, port: int) -> None:
    """As torchrun starts it, with a store at that port: by the variables that it sets, and with no group yet."""
    dist.destroy_process_group()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True")
    program = str(Path(__file__).with_name("zigzag_torchrun.py"))
    sys.argv = [program, "--device", "cpu", "--tokens", "64", "96", "--heads", "4", "2", "--head-dim", "16"]
    with redirect_stdout(StringIO()) as said:
        runpy.run_path(program, run_name="__main__")
    told = [line.split()[6] for line in said.getvalue().splitlines() if line.startswith("ok on 2 ranks of cpu: ")]
    assert told == (["64", "96"] if rank == 0 else []), said.getvalue()

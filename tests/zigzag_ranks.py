"""What ranks do that are processes: functions that a process can import, of tests/solutions/test_zigzag_gloo.py."""

from __future__ import annotations

import os
import sys
import time

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

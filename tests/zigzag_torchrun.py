"""Zigzag attention under torchrun, one rank a GPU by NCCL (or on the CPU by Gloo): a program for tests to start.

    PYTHONPATH=solutions/src:tests torchrun --standalone --nproc-per-node=4 tests/zigzag_torchrun.py

Needs torch and a backend. Each rank holds its part of everything against attention on one device, computed on its own
device; on a GPU a second run may not wait for the GPU. Prints a line for each case.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from zigzag_checks import Case, Expected, Tensors, drawn, expected, hold, run_rank


def main() -> None:
    """All cases of the command line."""
    told = _arguments()
    rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", rank) if told.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    for tokens in told.tokens:
        _check(_case(told, tokens, str(device)))
    dist.destroy_process_group()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, nargs=2, default=[32, 8])
    parser.add_argument("--head-dim", type=int, default=128)
    return parser.parse_args()


def _case(told: argparse.Namespace, tokens: int, device: str) -> Case:
    """A quarter of the tokens in one sequence and the rest in another."""
    lengths = [tokens // 4, tokens - tokens // 4]
    heads = (told.heads[0], told.heads[1])
    return Case(lengths, told.heads[1], heads, told.head_dim, torch.bfloat16, device, backend=told.backend)


def _check(case: Case) -> None:
    """Every way to go about it, against what one device gives."""
    began = time.monotonic()
    told = drawn(case)
    should = expected(case, told, dist.get_rank(), dist.get_world_size())
    for stride in (1, case.heads[1]):
        for grouped in (True, False):
            _run(case._replace(stride=stride, grouped=grouped), told, should)
    dist.barrier()
    if dist.get_rank() == 0:
        sizes = f"{case.cu_seqlens[-1]} tokens, heads {case.heads}, head_dim {case.head_dim}, backend {case.backend}"
        seconds = time.monotonic() - began
        print(f"ok on {dist.get_world_size()} ranks of {case.device}: {sizes}, {seconds:.1f} s", flush=True)  # noqa: T201


def _run(case: Case, told: Tensors, should: Expected) -> None:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    hold(case, run_rank(case, told, None, rank, world_size), should)
    if case.device != "cpu":
        with _nothing_waits():
            again = run_rank(case, told, None, rank, world_size)
        hold(case, again, should)


@contextmanager
def _nothing_waits() -> Iterator[None]:
    """Whatever makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":
    main()

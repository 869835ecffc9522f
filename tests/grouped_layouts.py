"""Slices over rows and shared keys, the tensors for them, and how a backend of grouped attention is run on them.

Needs torch and pytest only. Sizes are such that tiles of 64 and 128 begin, end and overlap in every way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from grouped_samples import Run, Tensors
from naive_grouped import Entry

from refgrid_solutions.grouped_attention import GroupedAttnPlan, grouped_flash_attn_func, plan_grouped_attn

FULL, CAUSAL = 0, 1


class Layout(NamedTuple):
    """Slices (q_start, q_end, k_start, k_end, mask_type) over so many rows and keys."""

    entries: list[Entry]
    total_q: int
    total_k: int


class Subject(NamedTuple):
    """A backend in one setting."""

    backend: str
    device: str = "cpu"
    dtype: torch.dtype = torch.bfloat16
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64


def zigzag(lengths: Sequence[int], rank: int, world: int) -> Layout:
    """What one rank of a zigzag ring attends to: of each sequence its early and its late chunk, over prefixes."""
    entries: list[Entry] = []
    row = start = 0
    for length in lengths:
        chunk = length // (2 * world)
        for index in (rank, 2 * world - 1 - rank):
            entries.append((row, row + chunk, start, start + (index + 1) * chunk, CAUSAL))
            row += chunk
        start += length
    return Layout(entries, row, start)


def layouts(unit: int) -> dict[str, Layout]:
    """By name; sizes grow with the unit (8 or more), odd ones stay odd."""
    n = unit
    prefixes = [(i * n, (i + 1) * n, 0, (i + 1) * n + 3, CAUSAL) for i in range(16)]
    scattered = [(i, i + 1, (7 * i) % (3 * n), (7 * i) % (3 * n) + i % 5 * n // 4, i % 2) for i in range(2 * n)]
    return {
        "one causal": Layout([(0, 9 * n + 1, 0, 9 * n + 1, CAUSAL)], 9 * n + 1, 9 * n + 1),
        "one full": Layout([(0, 5 * n - 1, 0, 9 * n + 1, FULL)], 5 * n - 1, 9 * n + 1),
        "zigzag": zigzag([16 * n], 1, 4),
        "zigzag of two sequences": zigzag([8 * n, 16 * n], 0, 4),
        "same keys": Layout([(i * n, (i + 1) * n, n, 7 * n + 5, CAUSAL) for i in range(4)], 4 * n, 8 * n),
        "sixteen prefixes": Layout(prefixes, 16 * n, 16 * n + 3),
        "both masks": Layout(
            [(0, 3 * n, 0, 6 * n, FULL), (3 * n, 5 * n + 1, 2 * n, 8 * n, CAUSAL), (5 * n + 1, 7 * n, 0, n - 1, FULL)],
            7 * n,
            8 * n,
        ),
        "masks interleaved": Layout([(i * n, (i + 1) * n, i, 4 * n - i, i % 2) for i in range(5)], 5 * n, 4 * n),
        "gaps": Layout(
            [
                (n, 2 * n + 1, n, 5 * n, CAUSAL),
                (4 * n, 6 * n, 0, 3 * n + 1, CAUSAL),
                (6 * n + 2, 7 * n, 0, 2 * n, FULL),
            ],
            8 * n,
            6 * n,
        ),
        "more rows than keys": Layout(
            [(0, 5 * n, 0, 2 * n + 1, CAUSAL), (5 * n, 6 * n, 3, 3, FULL), (6 * n, 8 * n, 0, 1, CAUSAL)], 8 * n, 4 * n
        ),
        "single tokens": Layout(scattered, 2 * n, 5 * n),
        "1 beside 99": Layout([(0, n, 0, n, CAUSAL), (n, 40 * n, 0, 40 * n, CAUSAL)], 40 * n, 40 * n),
        "out of order": Layout([(3 * n, 5 * n, 0, 5 * n, CAUSAL), (0, 3 * n, n, 3 * n, FULL)], 5 * n, 5 * n),
        "nothing": Layout([(2, 2, 0, n, FULL), (3, n, 4, 4, CAUSAL)], n, n),
    }


def parts(layout: Layout) -> Iterator[tuple[slice, slice, Layout]]:
    """The rows and the keys of each slice, and the slice alone over those."""
    for q_start, q_end, k_start, k_end, mask_type in layout.entries:
        own = (0, q_end - q_start, 0, k_end - k_start, mask_type)
        yield slice(q_start, q_end), slice(k_start, k_end), Layout([own], own[1], own[3])


def moved_rows(entries: Sequence[Entry]) -> tuple[list[Entry], list[int]]:
    """The slices with their rows back to back in this order, and which rows those were."""
    moved: list[Entry] = []
    order: list[int] = []
    for q_start, q_end, *keys in entries:
        moved.append((len(order), len(order) + q_end - q_start, keys[0], keys[1], keys[2]))
        order += range(q_start, q_end)
    return moved, order


def planned(
    layout: Layout, subject: Subject, entries: Sequence[Entry] | None = None, **options: Any
) -> GroupedAttnPlan:
    """The plan of a layout, or of other entries over its rows and keys."""
    entries = layout.entries if entries is None else entries
    return plan_grouped_attn(
        [entry[:2] for entry in entries],
        [entry[2:4] for entry in entries],
        [entry[4] for entry in entries],
        total_q=layout.total_q,
        total_k=layout.total_k,
        num_heads_q=subject.heads[0],
        num_heads_k=subject.heads[1],
        head_dim=subject.head_dim,
        dtype=subject.dtype,
        device=subject.device,
        **options,
    )


def drawn(layout: Layout, subject: Subject, seed: int = 0, spread: float = 1) -> Tensors:
    """q, k and v, standard normal times spread."""
    generator = torch.Generator(subject.device).manual_seed(seed)

    def normal(rows: int, heads: int) -> torch.Tensor:
        shape = (rows, heads, subject.head_dim)
        values = torch.randn(shape, generator=generator, device=subject.device, dtype=torch.float32)
        return (spread * values).to(subject.dtype)

    q = normal(layout.total_q, subject.heads[0])
    return q, normal(layout.total_k, subject.heads[1]), normal(layout.total_k, subject.heads[1])


def drawn_like(tensor: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """A gradient of it, standard normal, the same in every run: bounds on largest errors are near for some draws."""
    generator = torch.Generator(tensor.device).manual_seed(seed)
    return torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=torch.float32).to(tensor.dtype)


def run(told: Tensors, plan: GroupedAttnPlan, subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse, from tensors that are poisoned before they are written."""
    with poisoned_memory():
        return grouped_flash_attn_func(*told, plan, backend=subject.backend)


def run_backward(
    told: Tensors, plan: GroupedAttnPlan, subject: Subject, dout: torch.Tensor, scale: float | None = None
) -> Tensors:
    """dq, dk, dv; from poisoned tensors too if the plan is deterministic, as memory is poisoned by asking for that."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in told]
    with poisoned_memory():
        told = leaves[0], leaves[1], leaves[2]
        out, _ = grouped_flash_attn_func(*told, plan, softmax_scale=scale, backend=subject.backend)
    with poisoned_memory() if plan.deterministic else nullcontext():
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    return dq, dk, dv


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """What is allocated meanwhile and not written holds NaN."""
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(was)


def run_both(layout: Layout, subject: Subject, spread: float = 1, **options: Any) -> Run:
    """A forward and a backward pass of drawn tensors."""
    told, plan = drawn(layout, subject, spread=spread), planned(layout, subject, **options)
    leaves = [tensor.requires_grad_() for tensor in told]
    out, lse = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend=subject.backend)
    dout = drawn_like(out)
    found = torch.autograd.grad(out, leaves, dout)
    return Run(layout.entries, *(tensor.detach() for tensor in (*leaves, dout, out, lse, *found)))

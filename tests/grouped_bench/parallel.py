"""One rank of zigzag context parallelism, forward and backward, beside the algorithm that it comes from.

On one GPU the other ranks are taken to hold what this one holds: what is gathered is copied on the device. So a rank's
own work is timed, not the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from emulated_ranks import LoneExchange
from zigzag_origin import Setting, origin_attention

from grouped_bench.ways import Call, Problem, demand_equal
from refgrid_solutions.grouped_attention import zigzag_llama3_flash_attn_varlen_func
from refgrid_solutions.grouped_attention.backends import refusal

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# Gradients of q, k and v: as they come, as to join them would be timed, too.
Differentiate = Callable[[], tuple[torch.Tensor, ...]]


def parallel_ways(of: Problem, backends: Sequence[str]) -> tuple[dict[str, Differentiate], dict[str, str]]:
    """Of a zigzag shape with several ranks; of any other, none."""
    if of.shape.kind != "zigzag" or of.shape.world < 2:
        return {}, {}
    plan = of.plan(of.shape.pieces)
    refused = {name: reason for name in backends if (reason := refusal(name, plan))}
    ways: dict[str, Differentiate] = {}
    for name in (name for name in backends if name not in refused):
        ways[f"{name}: grouped"] = _both(of, _ours(of, name, grouped=True))
        ways[f"{name}: a call for each chunk"] = _both(of, _ours(of, name, grouped=False))
        ways[f"{name}: the origin's algorithm"] = _both(of, _origin(of, name))
    demand_equal({way: _joined(gradients) for way, gradients in ways.items()})
    return ways, refused


def _ours(of: Problem, name: str, *, grouped: bool) -> Attend:
    rows, world = len(of.q), of.shape.world
    return partial(
        zigzag_llama3_flash_attn_varlen_func,
        cu_seqlens_q=(0, rows),
        cu_seqlens_k=(0, rows * world),
        max_seqlen_q=rows,
        max_seqlen_k=rows * world,
        heads_k_stride=of.shape.stride or of.k.shape[1],
        causal=True,
        group=LoneExchange(of.shape.rank, world),
        use_grouped_attention=grouped,
        backend=name,
    )


def _origin(of: Problem, name: str) -> Attend:
    rows, world = len(of.q), of.shape.world
    own, whole = (torch.tensor([0, end], dtype=torch.int32, device=of.q.device) for end in (rows, rows * world))
    setting = Setting(own, whole, of.shape.stride or of.k.shape[1], LoneExchange(of.shape.rank, world), name)
    return lambda q, k, v: origin_attention(q, k, v, setting)


def _both(of: Problem, attend: Attend) -> Differentiate:
    """Gradients of this rank's q, k and v, its two chunks of the keys."""
    chunk, rank, world = len(of.q) // 2, of.shape.rank, of.shape.world
    starts = [rank * chunk, (2 * world - 1 - rank) * chunk]
    own = [torch.cat([keys[start : start + chunk] for start in starts]) for keys in (of.k, of.v)]
    leaves = [tensor.detach().requires_grad_() for tensor in (of.q, *own)]

    return lambda: torch.autograd.grad(attend(*leaves), leaves, of.dout)


def _joined(gradients: Differentiate) -> Call:
    return lambda: torch.cat([gradient.flatten() for gradient in gradients()])

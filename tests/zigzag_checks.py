"""Zigzag attention of ranks against attention on one device: for emulated ranks, Gloo, NCCL. Needs torch only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from emulated_ranks import emulated
from grouped_samples import hold_lse
from naive_grouped import attend, dense_mask, gradients, hold_to_twice

from refgrid_solutions.grouped_attention import (
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_prepare,
    zigzag_shard,
    zigzag_unshard,
)

NAMES = ("out", "lse", "dq", "dk", "dv")
# A hundred units in the last place of sums over at most some hundred keys.
ROUNDING = {torch.float64: 1e-13, torch.float32: 2e-5}


class Case(NamedTuple):
    """Whole sequences and how ranks go about them."""

    lengths: Sequence[int]
    stride: int = 2
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 8
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    causal: bool = True
    grouped: bool = True
    backend: str = "auto"
    deterministic: bool = False

    @property
    def cu_seqlens(self) -> list[int]:
        return [0, *accumulate(self.lengths)]


Tensors = tuple[torch.Tensor, ...]


def drawn(case: Case) -> Tensors:
    """q, k, v and dout of all ranks together, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    heads = (case.heads[0], case.heads[1], case.heads[1], case.heads[0])
    shapes = ((case.cu_seqlens[-1], count, case.head_dim) for count in heads)
    return tuple(torch.randn(shape, generator=generator).to(case.device, case.dtype) for shape in shapes)


def run_rank(case: Case, told: Tensors, group: Any, rank: int, world_size: int) -> Tensors:
    """out, lse, dq, dk and dv of one rank, from its own tokens."""
    told = tuple(zigzag_shard(tensor, case.cu_seqlens, rank, world_size) for tensor in told)
    q, k, v = leaves = [tensor.requires_grad_() for tensor in told[:3]]
    result = zigzag_llama3_flash_attn_varlen_func(
        *(q, k, v),
        *zigzag_llama3_prepare(case.cu_seqlens, rank, world_size)[:4],
        case.stride,
        causal=case.causal,
        deterministic=case.deterministic,
        return_attn_probs=True,
        group=group,
        use_grouped_attention=case.grouped,
        backend=case.backend,
    )
    out, lse, _ = result
    return out.detach(), lse, *torch.autograd.grad(out, leaves, told[3])


def run_emulated(case: Case, told: Tensors, world_size: int) -> list[Tensors]:
    """The same of every rank."""
    return emulated(world_size, lambda exchange: run_rank(case, told, exchange, exchange.rank, exchange.world_size))


def joined(case: Case, parts: Sequence[Tensors]) -> Tensors:
    """out, lse, dq, dk and dv of all sequences from those of the ranks."""
    together = zip(NAMES, zip(*parts, strict=True), strict=True)
    return tuple(zigzag_unshard(each, case.cu_seqlens, dim=1 if name == "lse" else 0) for name, each in together)


def on_one_device(case: Case, told: Tensors) -> Tensors:
    """out, lse, dq, dk and dv by the definition, every step in the tensors' dtype, one head of k at a time.

    In float64 one head of q at a time: scores of 16,384 tokens are 2 GiB then, and 8 GiB for four heads.
    """
    entries = [(start, end, start, end, int(case.causal)) for start, end in pairwise(case.cu_seqlens)]
    mask = dense_mask(entries, len(told[0]), len(told[0]), case.device)
    share, scale = case.heads[0] // case.heads[1], case.head_dim**-0.5
    step = 1 if told[0].dtype == torch.float64 else share
    found = []
    for first in range(0, case.heads[0], step):
        of_q, of_k = slice(first, first + step), slice(first // share, first // share + 1)
        q, k, v, dout = told[0][:, of_q], told[1][:, of_k], told[2][:, of_k], told[3][:, of_q]
        found.append((*attend(q, k, v, mask, scale), *gradients(q, k, v, mask, scale, dout)))
    out, lse, dq, dk, dv = zip(*found, strict=True)
    of_share = (len(told[0]), case.heads[1], share // step, case.head_dim)
    dk, dv = (torch.cat(each, dim=1).view(of_share).sum(2) for each in (dk, dv))
    return torch.cat(out, dim=1), torch.cat(lse), torch.cat(dq, dim=1), dk, dv


class Expected(NamedTuple):
    """What one device gives in float64, and by the same formula in the case's dtype, if that is a low one."""

    truths: Tensors
    lows: Tensors


def expected(case: Case, told: Tensors, rank: int | None = None, world_size: int = 1) -> Expected:
    """Of one rank's tokens, or of all."""
    truths = on_one_device(case, tuple(tensor.double() for tensor in told))
    lows = () if case.dtype in ROUNDING else on_one_device(case, told)
    return Expected(_of(case, truths, rank, world_size), _of(case, lows, rank, world_size))


def hold(case: Case, found: Tensors, should: Expected) -> None:
    """Raise unless found is as expected: to a rounding, or in a low dtype by the rule of twice the error."""
    if not should.lows:
        for name, value, truth in zip(NAMES, found, should.truths, strict=True):
            off, limit = (value.double() - truth).abs().max(), ROUNDING[case.dtype] * (1 + truth.abs().max())
            assert off <= limit, f"{name} is off by {off:.2e}, but should be by at most {limit:.2e}"
        return
    for name, value, low, truth in zip(NAMES, found, should.lows, should.truths, strict=True):
        if name == "lse":
            hold_lse(value, truth)
        else:
            largest = 3 if name in {"dk", "dv"} else 2
            hold_to_twice(name, value, low, truth, largest=largest, by_row=name in {"out", "dv"})


def _of(case: Case, whole: Tensors, rank: int | None, world_size: int) -> Tensors:
    """One rank's part of everything, or everything."""
    if rank is None or not whole:
        return whole
    return tuple(
        zigzag_shard(tensor, case.cu_seqlens, rank, world_size, dim=1 if name == "lse" else 0)
        for name, tensor in zip(NAMES, whole, strict=True)
    )

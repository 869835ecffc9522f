"""The origin's algorithm, which benchmarks compare with, is right: else the comparison would be worth nothing."""

from __future__ import annotations

import pytest
import torch
from emulated_ranks import emulated
from zigzag_checks import Case, Tensors, drawn, joined, on_one_device
from zigzag_origin import Setting, origin_attention

from refgrid_solutions.grouped_attention import zigzag_llama3_prepare, zigzag_shard
from refgrid_solutions.grouped_attention.zigzag import Exchange

pytestmark = pytest.mark.usefixtures("one_thread")


def run(case: Case, told: Tensors, world_size: int) -> list[Tensors]:
    """out, dq, dk and dv of every rank; lse is not given out, so out stands for it."""

    def rank(exchange: Exchange) -> Tensors:
        own = [zigzag_shard(tensor, case.cu_seqlens, exchange.rank, world_size) for tensor in told]
        q, k, v = leaves = [tensor.requires_grad_() for tensor in own[:3]]
        offsets = zigzag_llama3_prepare(case.cu_seqlens, exchange.rank, world_size)[:2]
        out = origin_attention(q, k, v, Setting(*offsets, case.stride, exchange))
        return out.detach(), out.detach().transpose(0, 1), *torch.autograd.grad(out, leaves, own[3])

    return emulated(world_size, rank)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 5, 8])
def test_every_rank_gives_attention_on_one_device(world_size: int, stride: int) -> None:
    case = Case([2 * world_size * chunk for chunk in (3, 1, 4)], stride=stride)
    told = drawn(case)

    found, expected = joined(case, run(case, told, world_size)), on_one_device(case, told)

    for one, other in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)

"""Zigzag attention of ranks emulated in one process: against one device, its launches, its plans, bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from emulated_ranks import emulated
from naive_grouped import attend, dense_mask
from varlen_kernels import Calls, varlen_kernels
from zigzag_checks import NAMES, Case, drawn, expected, hold, joined, run_emulated

from refgrid_solutions.grouped_attention import (
    backends,
    plan_grouped_attn,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
    zigzag_llama3_prepare,
    zigzag_shard,
)
from refgrid_solutions.grouped_attention.backends import aten
from refgrid_solutions.grouped_attention.zigzag import Exchange, pipeline, planned
from refgrid_solutions.grouped_attention.zigzag.planned import MOST_PLANS, zigzag_plan

pytestmark = pytest.mark.usefixtures("one_thread")


def attention(*told: Any, **named: Any) -> Any:
    """Without the types of its arguments: some lists of them have no fixed length here."""
    return zigzag_llama3_flash_attn_varlen_func(*told, **named)


def alone(call: Callable[..., Any]) -> Any:
    """What the one rank of a group gives."""
    return emulated(1, lambda exchange: call(group=exchange))[0]


def lengths(world_size: int) -> list[int]:
    """Chunks of 3, 1, 0 and 5 tokens."""
    return [2 * world_size * chunk for chunk in (3, 1, 0, 5)]


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "separate"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("world_size", range(1, 17))
def test_every_rank_gives_attention_on_one_device(world_size: int, stride: int, grouped: bool) -> None:
    case = Case(lengths(world_size), stride=stride, grouped=grouped)
    told = drawn(case)

    hold(case, joined(case, run_emulated(case, told, world_size)), expected(case, told))


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_and_mask(dtype: torch.dtype, causal: bool, world_size: int) -> None:
    case = Case([32, 8, 64], heads=(4, 2), head_dim=16, stride=1, dtype=dtype, causal=causal)
    told = drawn(case)
    parts = run_emulated(case, told, world_size)

    hold(case, joined(case, parts), expected(case, told))
    for out, lse, *gradients in parts:
        assert lse.dtype == torch.float32
        assert {tensor.dtype for tensor in (out, *gradients)} == {dtype}


@pytest.mark.parametrize("stride", [1, 2])
def test_one_call_and_two_give_the_same_bits(stride: int) -> None:
    """In float32 and float64, where a call's gradients of keys are not rounded before they are summed."""
    for dtype in (torch.float32, torch.float64):
        case = Case(lengths(4), stride=stride, dtype=dtype)
        told = drawn(case)
        pairs = zip(run_emulated(case, told, 4), run_emulated(case._replace(grouped=False), told, 4), strict=True)

        for grouped, separate in pairs:
            for name, one, other in zip(NAMES, grouped, separate, strict=True):
                assert torch.equal(one, other), f"{name} differs in {dtype}"


def test_one_call_and_two_give_the_same_bits_of_out_lse_and_dq_in_bfloat16() -> None:
    case = Case(lengths(4), dtype=torch.bfloat16)
    told = drawn(case)
    pairs = zip(run_emulated(case, told, 4), run_emulated(case._replace(grouped=False), told, 4), strict=True)

    for grouped, separate in pairs:
        assert all(torch.equal(one, other) for one, other in zip(grouped[:3], separate[:3], strict=True))


def test_gradients_of_keys_are_summed_over_ranks_in_float32() -> None:
    """256 from rank 0 and 1 from each of the others: in bfloat16, 256 + 1 is 256, however often."""
    case = Case([16], stride=1, heads=(1, 1), head_dim=1, dtype=torch.bfloat16, causal=False)
    q = k = torch.zeros(16, 1, 1, dtype=torch.bfloat16)
    dout = torch.zeros_like(q)
    dout[:8] = 16  # each row sees 16 keys alike, so each key gets a sixteenth
    dout[0] = 256 * 16

    found = joined(case, run_emulated(case, (q, k, k, dout), 8))

    assert found[4].unique().tolist() == [264]  # 263, to 8 bits


def test_a_softmax_scale_and_one_that_is_not_told() -> None:
    case = Case([16], stride=1)
    q, k, v, _ = drawn(case)
    told = zigzag_llama3_prepare([0, 16], 0, 1)
    mask = dense_mask([(0, 16, 0, 16, 1)], 16, 16)
    for scale in (None, 0.7):
        call = partial(attention, q, k, v, *told[:4], 1, softmax_scale=scale, causal=True)
        found = alone(call)
        torch.testing.assert_close(found, attend(q, k, v, mask, scale or 8**-0.5)[0])


def test_the_origins_arguments_in_their_order() -> None:
    q, k, v, _ = drawn(Case([16]))
    told = zigzag_llama3_prepare(torch.tensor([0, 16]), 0, 1)
    others = 1, told.local_k_slice, 0.0, 0.3, True, (-1, -1), None, True, True

    ((out, lse, nothing),) = emulated(1, lambda exchange: attention(q, k, v, *told[:4], *others, exchange, 2, True))

    torch.testing.assert_close((out, lse), attend(q, k, v, dense_mask([(0, 16, 0, 16, 1)], 16, 16), 0.3))
    assert nothing is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_tensors_give_the_same_and_one_gradient(world_size: int) -> None:
    case = Case(lengths(world_size), heads=(2, 2), stride=1)
    q, k, v, dout = drawn(case)

    def packed(exchange: Exchange, merge: Callable[..., list[torch.Tensor]], call: Any) -> tuple[torch.Tensor, ...]:
        rank = exchange.rank
        own = [zigzag_shard(tensor, case.cu_seqlens, rank, world_size) for tensor in (q, k, v, dout)]
        leaves = [tensor.requires_grad_() for tensor in merge(*own[:3])]
        told = zigzag_llama3_prepare(case.cu_seqlens, rank, world_size)
        out = call(*leaves, *told[:4], heads_k_stride=1, causal=True, group=exchange)
        return out.detach(), *torch.autograd.grad(out, leaves, own[3])

    apart = run_emulated(case, (q, k, v, dout), world_size)
    kv_call, qkv_call = (
        zigzag_llama3_flash_attn_varlen_kvpacked_func,
        zigzag_llama3_flash_attn_varlen_qkvpacked_func,
    )
    kv = emulated(world_size, lambda e: packed(e, lambda q, k, v: [q, torch.stack((k, v), 1)], kv_call))
    qkv = emulated(world_size, lambda e: packed(e, lambda q, k, v: [torch.stack((q, k, v), 1)], qkv_call))

    for (out, _, dq, dk, dv), of_kv, of_qkv in zip(apart, kv, qkv, strict=True):
        assert torch.equal(of_kv[0], out)
        assert torch.equal(of_qkv[0], out)
        assert torch.equal(of_kv[1], dq)
        assert torch.equal(of_kv[2], torch.stack((dk, dv), 1))
        assert torch.equal(of_qkv[1], torch.stack((dq, dk, dv), 1))


def test_the_log_sum_exp_has_no_gradient_and_needs_none_of_the_keys() -> None:
    q, k, v, _ = drawn(Case([16]))
    q.requires_grad_()
    told = zigzag_llama3_prepare([0, 16], 0, 1)

    ((out, lse, _),) = emulated(
        1,
        lambda exchange: attention(q, k, v, *told[:4], 2, return_attn_probs=True, group=exchange),
    )
    out.sum().backward()

    assert not lse.requires_grad
    assert q.grad is not None
    assert k.grad is None


def test_gradients_are_those_of_finite_differences() -> None:
    case = Case([8], heads=(2, 1), stride=1, head_dim=2)
    leaves = [tensor.requires_grad_() for tensor in drawn(case)[:3]]

    def every_rank(*whole: torch.Tensor) -> torch.Tensor:
        def of(exchange: Exchange) -> torch.Tensor:
            own = [zigzag_shard(tensor, case.cu_seqlens, exchange.rank, 1) for tensor in whole]
            told = zigzag_llama3_prepare(case.cu_seqlens, exchange.rank, 1)
            return attention(*own, *told[:4], 1, causal=True, group=exchange)

        return emulated(1, of)[0]

    assert torch.autograd.gradcheck(every_rank, leaves)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The kernels of PyTorch's own backend stood in for on this CPU; what they refuse, this refuses."""
    row = backends.TABLE["torch"]
    monkeypatch.setitem(backends.TABLE, "torch", backends.Row(row.module, row.says, devices=("cpu",)))
    monkeypatch.setattr(aten, "refuses", lambda _: "")
    zigzag_plan.cache_clear()
    with varlen_kernels() as calls:
        yield calls
    zigzag_plan.cache_clear()


@pytest.mark.parametrize(("grouped", "calls"), [(True, 1), (False, 2)])
def test_one_launch_a_step_forward_or_two(grouped: bool, calls: int, launched: Calls) -> None:
    world_size, steps = 4, 2
    case = Case([64, 128], stride=1, head_dim=64, dtype=torch.bfloat16, backend="torch", grouped=grouped)
    told = drawn(case)

    hold(case, joined(case, run_emulated(case, told, world_size)), expected(case, told))

    assert launched.count("aten forward") == world_size * steps * calls


def test_determinism_is_passed_on(launched: Calls) -> None:
    case = Case([64], head_dim=64, dtype=torch.bfloat16, backend="torch", deterministic=True)

    run_emulated(case, drawn(case), 1)

    assert set(launched) == {"aten forward", "aten backward, deterministic"}


def test_a_plan_is_made_once_for_all_layers_and_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*told: Any, **named: Any) -> Any:
        made.append(told)
        return plan_grouped_attn(*told, **named)

    monkeypatch.setattr(planned, "plan_grouped_attn", counted)
    zigzag_plan.cache_clear()
    case = Case(lengths(1), stride=1)
    for _ in range(3):
        run_emulated(case, drawn(case), 1)
    assert len(made) == 1

    run_emulated(case._replace(grouped=False), drawn(case), 1)
    assert len(made) == 3


def test_plans_are_kept_up_to_a_number() -> None:
    for chunk in range(MOST_PLANS + 5):
        case = Case([2 * chunk], heads=(1, 1), stride=1, head_dim=2)
        run_emulated(case, drawn(case), 1)

    assert zigzag_plan.cache_info().currsize == MOST_PLANS


def test_a_plan_made_in_inference_mode_serves_training() -> None:
    zigzag_plan.cache_clear()
    case = Case(lengths(2))
    told = drawn(case)

    def infer(exchange: Exchange) -> torch.Tensor:
        with torch.inference_mode():
            own = [zigzag_shard(tensor, case.cu_seqlens, exchange.rank, 2) for tensor in told[:3]]
            prepared = zigzag_llama3_prepare(case.cu_seqlens, exchange.rank, 2)
            return attention(*own, *prepared[:4], 2, causal=True, group=exchange)

    outs = emulated(2, infer)
    parts = run_emulated(case, told, 2)

    hold(case, joined(case, parts), expected(case, told))
    assert all(torch.equal(out, part[0]) for out, part in zip(outs, parts, strict=True))


def test_a_part_that_is_the_whole_is_it_and_others_are_put_in_their_places() -> None:
    alone, two = pipeline._Whole((4, 2)), pipeline._Whole((4, 2))
    part = torch.ones(4, 2)

    alone.put((slice(None), slice(None)), part)
    two.put((slice(2, 4), slice(None)), part[2:])
    two.put((torch.tensor([1, 0]), slice(None)), torch.tensor([[3.0, 3.0], [2.0, 2.0]]))

    assert alone.tensor is part
    assert two.tensor.tolist() == [[2.0, 2.0], [3.0, 3.0], [1.0, 1.0], [1.0, 1.0]]

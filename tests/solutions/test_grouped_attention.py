"""Grouped attention on the CPU: the reference against the definition, its gradients, and the custom ops."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_grouped import Entry, attend, dense_mask, gradients

from refgrid_solutions.grouped_attention import GroupedAttnPlan, grouped_flash_attn_func, plan_grouped_attn
from refgrid_solutions.grouped_attention.backends import naive

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 0.3


def planned(entries: list[Entry], total_q: int, total_k: int, **changes: Any) -> GroupedAttnPlan:
    sizes = {"num_heads_q": 4, "num_heads_k": 2, "head_dim": 8, "dtype": torch.float64, "device": "cpu", **changes}
    ranges = [entry[:2] for entry in entries], [entry[2:4] for entry in entries], [entry[4] for entry in entries]
    return plan_grouped_attn(*ranges, total_q=total_q, total_k=total_k, **sizes)


def drawn(plan: GroupedAttnPlan, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    q = torch.randn(plan.total_q, plan.num_heads_q, plan.head_dim, dtype=plan.dtype)
    k, v = (torch.randn(plan.total_k, plan.num_heads_k, plan.head_dim, dtype=plan.dtype) for _ in range(2))
    return q, k, v


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[Entry], int, int]:
    cuts = sorted(draw(st.lists(st.integers(0, 9), max_size=6)))
    total_q, total_k = max([*cuts, draw(st.integers(0, 9))]), draw(st.integers(0, 9))
    entries = []
    for start, end in zip(cuts[::2], cuts[1::2], strict=False):
        keys = sorted((draw(st.integers(0, total_k)), draw(st.integers(0, total_k))))
        entries.append((start, end, keys[0], keys[1], draw(st.integers(0, 1))))
    return draw(st.permutations(entries)), total_q, total_k


@settings(deadline=None)
@given(groups())
def test_the_reference_is_the_definition(drawn_groups: tuple[list[Entry], int, int]) -> None:
    entries, total_q, total_k = drawn_groups
    plan = planned(*drawn_groups)
    q, k, v = drawn(plan)
    dout = torch.randn_like(q)
    mask = dense_mask(entries, total_q, total_k)

    q, k, v = (tensor.requires_grad_() for tensor in (q, k, v))
    out, lse = grouped_flash_attn_func(q, k, v, plan, softmax_scale=SCALE)
    found = torch.autograd.grad(out, (q, k, v), dout)

    expected_out, expected_lse = attend(q, k, v, mask, SCALE)
    torch.testing.assert_close(out, expected_out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    for one, other in zip(found, gradients(q, k, v, mask, SCALE, dout), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


SOME: list[Entry] = [(0, 3, 0, 4, 1), (5, 9, 2, 4, 1), (9, 11, 1, 7, 0)]  # rows 3 and 4 in no slice, 5 and 6 see no key


@pytest.fixture
def plan() -> GroupedAttnPlan:
    return planned(SOME, 12, 8)


def test_rows_without_keys_give_zero_minus_infinity_and_zero_gradients(plan: GroupedAttnPlan) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in drawn(plan))

    out, lse = grouped_flash_attn_func(q, k, v, plan)
    out.sum().backward()

    blind = [3, 4, 5, 6, 11]
    assert torch.equal(out[blind], torch.zeros(5, 4, 8, dtype=q.dtype))
    assert lse[:, blind].isneginf().all()
    assert lse.isneginf().sum() == 4 * 5
    assert q.grad is not None
    assert not q.grad[blind].any()


def test_what_keys_in_no_range_hold_never_matters(plan: GroupedAttnPlan) -> None:
    q, k, v = drawn(plan)
    expected = grouped_flash_attn_func(q, k, v, plan)
    k[7], v[7] = 1e4, -1e4
    k, v = k.requires_grad_(), v.requires_grad_()

    found = grouped_flash_attn_func(q, k, v, plan)
    found[0].sum().backward()

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert k.grad is not None
    assert v.grad is not None
    assert not k.grad[7].any()
    assert not v.grad[7].any()


def test_gradients_are_those_of_finite_differences(plan: GroupedAttnPlan) -> None:
    leaves = [tensor.requires_grad_() for tensor in drawn(plan)]

    assert torch.autograd.gradcheck(lambda q, k, v: grouped_flash_attn_func(q, k, v, plan, return_lse=False), leaves)


def test_blocks_of_rows_change_nothing(plan: GroupedAttnPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = leaves = [tensor.requires_grad_() for tensor in drawn(plan)]
    expected = grouped_flash_attn_func(q, k, v, plan, return_lse=False)
    gradients_of = torch.autograd.grad(expected.square().sum(), leaves)
    monkeypatch.setattr(naive, "_SCORES", {"cpu": 1})

    found = grouped_flash_attn_func(q, k, v, plan, return_lse=False)

    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found.square().sum(), leaves), gradients_of, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_each_output_has_its_dtype_and_layout(dtype: torch.dtype) -> None:
    plan = planned(SOME, 12, 8, dtype=dtype)
    q, k, v = (tensor.requires_grad_() for tensor in drawn(plan))

    out, lse = grouped_flash_attn_func(q, k, v, plan)
    out.sum().backward()

    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (out.shape, lse.shape) == (q.shape, (4, 12))
    for leaf in (q, k, v):
        assert leaf.grad is not None
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, dtype)


def test_the_log_sum_exp_has_no_gradient(plan: GroupedAttnPlan) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in drawn(plan))

    out, lse = grouped_flash_attn_func(q, k, v, plan)

    assert out.requires_grad
    assert not lse.requires_grad


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_whole_graph_is_compiled_with_its_gradients(backend: str, plan: GroupedAttnPlan) -> None:
    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = grouped_flash_attn_func(q * 2, k, v, plan, backend=backend)
        return out * 3, lse

    leaves = [tensor.requires_grad_() for tensor in drawn(plan)]
    expected = step(*leaves)

    found = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)

    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    pairs = (torch.autograd.grad(pair[0].sum(), leaves) for pair in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(*pairs, strict=True))


def test_a_plan_is_an_argument_of_a_compiled_function() -> None:
    compiled = torch.compile(grouped_flash_attn_func, fullgraph=True, backend="aot_eager")
    for entries in (SOME, [(0, 12, 0, 8, 0)], [(0, 5, 1, 8, 1), (5, 6, 0, 8, 1)]):
        plan = planned(entries, 12, 8)
        told = drawn(plan)

        assert torch.equal(compiled(*told, plan)[0], grouped_flash_attn_func(*told, plan)[0])


def test_the_custom_ops_keep_their_contract(plan: GroupedAttnPlan) -> None:
    q, k, v = (tensor.requires_grad_() for tensor in drawn(plan))
    told = (plan.host, [torch.zeros(3, dtype=torch.int32)], SCALE, "reference")
    out, lse = torch.ops.refgrid.grouped_attn_forward(q, k, v, *told)
    detached = [tensor.detach() for tensor in (torch.randn_like(out), q, k, v, out, lse)]

    torch.library.opcheck(torch.ops.refgrid.grouped_attn_forward.default, (q, k, v, *told))
    torch.library.opcheck(torch.ops.refgrid.grouped_attn_backward.default, (*detached, *told))


@pytest.mark.parametrize("argument", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensor: tensor[:-1], r"{}.shape = \(.*, but should be \(.*, as planned"),
        (lambda tensor: tensor[:, :1], r"{}.shape = \(.*, but should be \(.*, as planned"),
        (lambda tensor: tensor.half(), r"{}.dtype = torch.float16, but should be torch.float64, as planned"),
        (lambda tensor: tensor.to("meta"), r"{}.device = meta, but should be cpu, as planned"),
    ],
    ids=["rows", "heads", "dtype", "device"],
)
def test_a_tensor_that_does_not_fit_the_plan_is_named(
    argument: str, change: Any, words: str, plan: GroupedAttnPlan
) -> None:
    told = dict(zip(("q", "k", "v"), drawn(plan), strict=True))
    told[argument] = change(told[argument])

    with pytest.raises(ValueError, match=words.format(argument)):
        grouped_flash_attn_func(**told, plan=plan)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "0.1", torch.ones(())])
def test_a_scale_that_is_no_finite_number_is_named(scale: Any, plan: GroupedAttnPlan) -> None:
    words = re.escape(f"softmax_scale = {scale!r}, but should be a finite number, or None for head_dim ** -0.5")
    with pytest.raises(ValueError, match=words):
        grouped_flash_attn_func(*drawn(plan), plan, softmax_scale=scale)


def test_a_scale_that_is_told_is_compiled_whole(plan: GroupedAttnPlan) -> None:
    told = drawn(plan)
    compiled = torch.compile(grouped_flash_attn_func, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.4, 1):
        expected = grouped_flash_attn_func(*told, plan, softmax_scale=scale)

        assert torch.equal(compiled(*told, plan, softmax_scale=scale)[0], expected[0])

"""What there is hardly anything of: no rows, no keys, one token; and gradients asked for twice, or of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_ranks import LoneExchange
from grouped_layouts import CAUSAL, FULL, Layout, Subject, drawn, planned, run, run_backward
from varlen_kernels import backends_of_a_gpu

from refgrid_solutions.grouped_attention import (
    grouped_flash_attn_func,
    grouped_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_prepare,
)
from refgrid_solutions.grouped_attention.zigzag.planned import zigzag_plan

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = pytest.mark.parametrize("backend", ["reference", "torch", "fa3"])
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    zigzag_plan.cache_clear()
    with backends_of_a_gpu(monkeypatch):
        yield
    zigzag_plan.cache_clear()


def subject(backend: str) -> Subject:
    return Subject(backend, head_dim=16)


@BACKENDS
@pytest.mark.parametrize("mask", [FULL, CAUSAL])
@pytest.mark.parametrize(("total_q", "total_k"), [(0, 9), (9, 0), (0, 0)])
def test_no_rows_or_no_keys_at_all(total_q: int, total_k: int, mask: int, backend: str) -> None:
    layout = Layout([(0, total_q, 0, total_k, mask)], total_q, total_k)
    plan, told = planned(layout, subject(backend)), drawn(layout, subject(backend))

    out, lse = run(told, plan, subject(backend))
    gradients = run_backward(told, plan, subject(backend), torch.ones_like(told[0]))

    assert (out.shape, lse.shape) == (told[0].shape, (4, total_q))
    assert not out.any()
    assert lse.isneginf().all()
    assert not any(gradient.any() for gradient in gradients)


@BACKENDS
@pytest.mark.parametrize("mask", [FULL, CAUSAL])
def test_one_token_of_one_key_gives_its_value(mask: int, backend: str) -> None:
    layout = Layout([(0, 1, 0, 1, mask)], 1, 1)
    plan, told = planned(layout, subject(backend)), drawn(layout, subject(backend))

    out, _ = run(told, plan, subject(backend))
    dq, dk, dv = run_backward(told, plan, subject(backend), torch.ones_like(out))

    assert torch.equal(out, told[2].repeat_interleave(2, dim=1))
    torch.testing.assert_close(dv, torch.full_like(dv, 2))
    for gradient in (dq, dk):  # the weight of an only key does not depend on its score
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-2)


def test_a_list_whose_first_group_has_no_rows() -> None:
    _, k, v = drawn(Layout([], 0, 9), subject("reference"))
    groups = [torch.randn(rows, 4, 16).to(k.dtype) for rows in (0, 5)]

    outs, lses = grouped_flash_attn_varlen_func(groups, k, v, [[0, 0, 0], [0, 0, 5]], [[0, 0, 0], [0, 4, 9]])
    (alone,), _ = grouped_flash_attn_varlen_func(groups[1:], k[4:], v[4:], [[0, 5]], [[0, 5]])

    assert [tuple(out.shape) for out in outs] == [(0, 4, 16), (5, 4, 16)]
    assert [tuple(lse.shape) for lse in lses] == [(4, 0), (4, 5)]
    assert torch.equal(outs[1], alone)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    layout = Layout([(0, 3, 0, 5, CAUSAL), (3, 8, 2, 8, FULL)], 8, 8)
    return grouped_flash_attn_func(q, k, v, planned(layout, subject("reference")), return_lse=False)


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.cat(grouped_flash_attn_varlen_func([q[:3], q[3:]], k, v, [[0, 3], [0, 5]], [[0, 5], [0, 8]])[0])


def zigzag(*told: torch.Tensor, lengths: tuple[int, ...] = (4, 0, 4), ranks: int = 1) -> torch.Tensor:
    offsets = [sum(lengths[:end]) for end in range(len(lengths) + 1)]
    prepared = zigzag_llama3_prepare(offsets, 0, ranks)
    call: Any = zigzag_llama3_flash_attn_varlen_func
    found: torch.Tensor = call(*told, *prepared[:4], 1, causal=True, group=LoneExchange(0, ranks))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_ranks_without_any_tokens_have_empty_results(lengths: tuple[int, ...], ranks: int) -> None:
    leaves = [tensor.requires_grad_() for tensor in drawn(Layout([], 0, 0), subject("reference"))]

    out = zigzag(*leaves, lengths=lengths, ranks=ranks)
    gradients = torch.autograd.grad(out.sum(), leaves)

    assert [one.shape for one in (out, *gradients)] == [leaf.shape for leaf in (leaves[0], *leaves)]


def leaves_of_eight() -> list[torch.Tensor]:
    told = drawn(Layout([], 8, 8), subject("reference")._replace(dtype=torch.bfloat16))
    return [tensor.requires_grad_() for tensor in told]


STEPS = pytest.mark.parametrize("step", [grouped, varlen, zigzag])


@STEPS
def test_a_graph_that_is_kept_gives_its_gradients_twice(step: Step) -> None:
    leaves = leaves_of_eight()
    total = step(*leaves).square().sum()

    once = torch.autograd.grad(total, leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)

    assert any(gradient.any() for gradient in once)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


@STEPS
def test_a_gradient_of_gradients_is_refused_and_not_left_out(step: Step) -> None:
    leaves = leaves_of_eight()
    gradients = torch.autograd.grad(step(*leaves).square().sum(), leaves, create_graph=True)

    with pytest.raises(RuntimeError, match=r"no autograd formula was registered|differentiate twice a function"):
        torch.stack([gradient.sum() for gradient in gradients]).sum().backward()

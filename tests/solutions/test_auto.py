"""Which backend "auto" is: one where no gradient is needed, another where one is; both ready before the first call."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from emulated_ranks import LoneExchange
from grouped_layouts import Layout, Subject, drawn, planned, zigzag
from varlen_kernels import Calls, backends_of_a_gpu

from refgrid_solutions.grouped_attention import (
    backends,
    grouped_flash_attn_func,
    grouped_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_func,
)
from refgrid_solutions.grouped_attention.backends import aten, fa3
from refgrid_solutions.grouped_attention.predicted import COPIES
from refgrid_solutions.grouped_attention.zigzag.planned import zigzag_plan

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = zigzag([128], 1, 4)


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """What is launched where "auto" is fa3 without gradients, and torch with them."""
    monkeypatch.setattr(backends, "choose", lambda _: ("fa3", "torch"))
    zigzag_plan.cache_clear()  # kept plans have what "auto" was when they were made
    backends.say.cache_clear()
    with backends_of_a_gpu(monkeypatch) as calls:
        yield calls
    zigzag_plan.cache_clear()


@pytest.mark.parametrize(
    ("refused", "few", "chosen"),
    [
        (set(), False, ("fa3", "triton")),
        (set(), True, ("fa3", "fa3")),
        ({"fa3"}, False, ("triton", "triton")),
        ({"fa3"}, True, ("triton", "triton")),
        ({"triton"}, False, ("fa3", "fa3")),
        ({"fa3", "triton"}, False, ("torch", "torch")),
        ({"fa3", "triton", "torch", "cuda"}, False, ("reference", "reference")),
    ],
)
def test_auto_takes_the_fastest_that_can_run_without_gradients_and_with_them(
    refused: set[str], few: bool, chosen: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "refusal", lambda name, _: "no" if name in refused else "")
    monkeypatch.setattr(backends, "few_tiles", lambda _: few)
    plan: Any = SimpleNamespace(device=torch.device("cuda", 0), deterministic=False)

    assert backends.choose(plan) == chosen


def test_where_none_can_run_each_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "refusal", lambda name, _: f"{name} is tired")
    monkeypatch.setattr(backends, "few_tiles", lambda _: False)
    plan: Any = SimpleNamespace(device=torch.device("cuda", 0))

    with pytest.raises(ValueError, match="no backend can run this: fa3: fa3 is tired; triton: triton is tired; torch:"):
        backends.choose(plan)


def test_on_a_cpu_auto_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    with backends_of_a_gpu(monkeypatch) as calls:
        plan = planned(LAYOUT, Subject("auto"))
        grouped_flash_attn_func(*drawn(LAYOUT, Subject("auto")), plan)

    assert plan.auto_backends == ("reference", "reference")  # on a CPU, whoever else can run
    assert calls == []


@pytest.mark.parametrize("differentiated", [0, 1, 2])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_auto_depends_on_whether_a_gradient_is_needed(differentiated: int, grad_mode: bool, auto: Calls) -> None:
    plan, told = planned(LAYOUT, Subject("auto")), drawn(LAYOUT, Subject("auto"))
    told[differentiated].requires_grad_()

    with torch.set_grad_enabled(grad_mode):
        out, _ = grouped_flash_attn_func(*told, plan)

    assert out.requires_grad == grad_mode
    assert auto == (["aten forward"] if grad_mode else ["fa3 forward, num_splits=1"])


def test_auto_is_fastest_forward_where_no_tensor_requires_a_gradient(auto: Calls) -> None:
    plan = planned(LAYOUT, Subject("auto"))

    grouped_flash_attn_func(*drawn(LAYOUT, Subject("auto")), plan)

    assert auto == ["fa3 forward, num_splits=1"]


def test_auto_is_what_it_is_when_compiled_whole(auto: Calls) -> None:
    plan, told = planned(LAYOUT, Subject("auto")), drawn(LAYOUT, Subject("auto"))

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return grouped_flash_attn_func(q, k, v, plan)[0]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    compiled(*told)
    out = compiled(*(tensor.clone().requires_grad_() for tensor in told))
    out.sum().backward()
    with torch.no_grad():
        compiled(*(tensor.clone().requires_grad_() for tensor in told))

    forward, backward = "fa3 forward, num_splits=1", ["aten forward", "aten backward, in any order"]
    assert auto == [forward, *backward, forward]


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize(
    ("options", "ready"),
    [
        ({}, {"torch": True, "fa3": False}),
        ({"backward": False}, {"fa3": False}),
        ({"backward": True}, {"torch": True}),
        ({"backend": "torch"}, {"torch": True}),
        ({"backend": "torch", "backward": False}, {"torch": False}),
    ],
)
def test_a_plan_is_ready_for_auto_or_what_it_was_told(options: dict[str, Any], ready: dict[str, bool]) -> None:
    plan = planned(LAYOUT, Subject("auto"), **options)

    assert {name: made.both for name, made in plan._metadata.items()} == ready
    assert (plan.prepare(), plan.prepare(backward=True)) == plan.auto_backends == ("fa3", "torch")
    assert all(plan._metadata[name].both for name in ("fa3", "torch"))


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("backend", ["torch", "fa3"])
def test_what_only_a_backward_pass_reads_is_made_when_one_is_needed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faster_way = Mock(return_value=COPIES)
    for module in (aten, fa3):
        monkeypatch.setattr(module, "faster_way", faster_way)
    plan = planned(LAYOUT, Subject(backend), backend=backend, backward=False)
    forward = plan.metadata(backend)
    assert faster_way.call_count == 0

    q, k, v = drawn(LAYOUT, Subject(backend))
    grouped_flash_attn_func(q, k, v, plan, backend=backend)
    assert plan.metadata(backend) is forward

    out, _ = grouped_flash_attn_func(q.requires_grad_(), k, v, plan, backend=backend)
    out.sum().backward()
    grouped_flash_attn_func(q.detach(), k, v, plan, backend=backend)
    assert faster_way.call_count == 1
    assert len(plan.metadata(backend)) == len(forward) + 1  # the offsets of copied keys


def test_what_auto_chose_is_logged_once(auto: Calls, caplog: pytest.LogCaptureFixture) -> None:
    q, k, v = drawn(Layout([], 8, 8), Subject("auto"))
    with caplog.at_level("INFO", logger="refgrid_solutions"):
        for backend in ("reference", "auto", "auto"):
            grouped_flash_attn_varlen_func([q], k, v, [[0, 8]], [[0, 8]], causal=True, backend=backend)
        zigzag_llama3_flash_attn_varlen_func(q, k, v, [0, 8], [0, 8], 8, 8, 2, causal=True, group=LoneExchange(0, 1))

    said = "backend = 'auto' is 'fa3' where no gradient is needed, and 'torch' where one is"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert auto == ["fa3 forward, num_splits=1"] * 3


def test_the_list_form_and_zigzag_take_what_auto_takes(auto: Calls) -> None:
    q, k, v = drawn(Layout([], 8, 8), Subject("auto"))
    alone = LoneExchange(0, 1)
    for leaf in (q, q.clone().requires_grad_()):
        grouped_flash_attn_varlen_func([leaf], k, v, [[0, 8]], [[0, 8]], causal=True)
        zigzag_llama3_flash_attn_varlen_func(leaf, k, v, [0, 8], [0, 8], 8, 8, 2, causal=True, group=alone)

    assert auto == ["fa3 forward, num_splits=1"] * 2 + ["aten forward"] * 2

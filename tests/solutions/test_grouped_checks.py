"""The checks of grouped attention see the faults that they are there for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from grouped_checks import CHECKS, LARGE, check_compiled, check_precision
from grouped_layouts import Layout, Subject, layouts
from grouped_samples import hold_lse
from hypothesis import given
from hypothesis import strategies as st
from naive_grouped import Entry, dense_mask, hold_to_twice, visible

from refgrid_solutions.grouped_attention.backends import naive
from refgrid_solutions.grouped_attention.plan import host_ints
from refgrid_solutions.grouped_attention.ranges import CAUSAL, Slice

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = layouts(8)
ALL = {**CHECKS, **LARGE}
Fault = Callable[..., Any]


def forward_fault(change: Callable[..., Any]) -> Fault:
    """The reference, with out and lse changed by change(out, lse, (q, k, v), plan)."""
    true = naive.forward

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(*told: Any) -> Any:
            return change(*true(*told), told[:3], told[3])

        monkeypatch.setattr(naive, "forward", faulty)

    return plant


def backward_fault(index: int, change: Callable[..., Any]) -> Fault:
    """The reference, with one of dq, dk and dv changed by change(gradient, plan)."""
    true = naive.backward

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        def faulty(*told: Any) -> Any:
            found = list(true(*told))
            found[index] = change(found[index], told[6])
            return tuple(found)

        monkeypatch.setattr(naive, "backward", faulty)

    return plant


def summed_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, with gradients of a slice after the other added up in the tensors' dtype."""
    true: Any = naive.backward

    def faulty(*told: Any) -> Any:
        plan = told[6]
        alone = [replace(plan, host=host_ints([0, 0, *piece])) for piece in plan.slices]
        parts = [true(*told[:6], each, told[7]) for each in alone]
        return [sum(gradients) for gradients in zip(*parts, strict=True)]

    monkeypatch.setattr(naive, "backward", faulty)


def input_fault(change: Callable[..., Any]) -> Fault:
    """The reference of changed q, k and v."""
    true = naive.forward

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(naive, "forward", lambda *told: true(*change(*told[:3]), *told[3:]))

    return plant


def diagonal(shift: Callable[[Slice], int]) -> Fault:
    """Causal rows that see so many keys more than they should."""

    def block(piece: Slice, first: int, last: int, device: torch.device) -> naive._Block:
        more = shift(piece) if piece.mask_type == CAUSAL else 0
        counts = torch.tensor([max(piece.visible(row) + more, 1) for row in range(first, last)], device=device)
        rows, keys = slice(piece.q_start + first, piece.q_start + last), slice(piece.k_start, piece.k_end)
        return naive._Block(rows, keys, torch.arange(piece.num_keys, device=device) >= counts[:, None])

    return lambda monkeypatch: monkeypatch.setattr(naive, "_block", block)


def _packed_rows(q: Any, k: Any, v: Any) -> Any:
    """q as if its memory were in the order of its rows."""
    return q.as_strided(q.shape, torch.empty(q.shape).stride()), k, v


def _keys_that_leak(out: Any, lse: Any, told: Any, _plan: Any) -> Any:
    return out + 1e-3 * told[1].float().mean().to(out.dtype), lse


def _of_slices_only(dq: Any, plan: Any) -> Any:
    """The other rows are left as memory was: by luck zero, as they should be, unless it is poisoned."""
    left = torch.empty_like(dq) if torch.are_deterministic_algorithms_enabled() else torch.zeros_like(dq)
    for piece in plan.slices:
        left[piece.q_start : piece.q_end] = dq[piece.q_start : piece.q_end]
    return left


def _several(plan: Any) -> bool:
    return len(plan.slices) > 1


def _begins_late(plan: Any) -> bool:
    """Whether another slice than that of the first row was told first."""
    return bool(plan.slices[0].q_start > 0)


_OF_ROWS = {
    "out too large": forward_fault(lambda out, lse, *_: (out * 1.02, lse)),
    "dq too large": backward_fault(0, lambda dq, _: dq * 1.05),
}
_OF_KEYS = {
    "dk too large": backward_fault(1, lambda dk, _: dk * 1.05),
    "dv too large": backward_fault(2, lambda dv, _: dv * 1.05),
    "no dv": backward_fault(2, lambda dv, _: dv * 0),
}
_LARGE_FAULTS = {"precision": {**_OF_ROWS, **_OF_KEYS}, "sampled rows": _OF_ROWS, "sampled keys": _OF_KEYS}

FAULTS: dict[str, tuple[str, str, Fault]] = {
    "out too large": ("precision", "zigzag", forward_fault(lambda out, lse, *_: (out * 1.02, lse))),
    "lse off": ("precision", "zigzag", forward_fault(lambda out, lse, *_: (out, lse + 0.01))),
    "dq too small": ("precision", "zigzag", backward_fault(0, lambda dq, _: dq * 0.97)),
    "dk too large": ("precision", "zigzag", backward_fault(1, lambda dk, _: dk * 1.05)),
    "dv too large": ("precision", "zigzag", backward_fault(2, lambda dv, _: dv * 1.05)),
    "lse of blind rows": (
        "rows without keys",
        "gaps",
        forward_fault(lambda out, lse, *_: (out, lse.masked_fill(lse == -math.inf, math.inf))),
    ),
    "rows never written": (
        "rows without keys",
        "gaps",
        forward_fault(
            lambda out, lse, *_: (torch.where((lse == -math.inf).T[..., None], torch.empty_like(out), out), lse)
        ),
    ),
    "gradients of unseen keys": ("rows without keys", "gaps", backward_fault(1, lambda dk, _: dk + 1e-3)),
    "one key more": ("visible counts", "zigzag", diagonal(lambda _: 1)),
    "one key more in some row": ("visible counts of rows", "zigzag", diagonal(lambda _: 1)),
    "one key less": ("needles", "zigzag", diagonal(lambda _: -1)),
    "a needle too many": ("needles", "gaps", diagonal(lambda _: 1)),
    "groups that change each other": (
        "separate calls",
        "zigzag",
        forward_fault(lambda out, lse, _, plan: (out * (1.01 if _several(plan) else 1), lse)),
    ),
    "a group's gradients left out": (
        "summed gradients",
        "same keys",
        backward_fault(1, lambda dk, plan: dk * (0.9 if _several(plan) else 1)),
    ),
    "slices summed in the tensors' dtype": ("summed in float32", "same keys", summed_in_halves),
    "the first slice favoured": (
        "order of slices",
        "zigzag",
        forward_fault(lambda out, lse, _, plan: (out + 0.01 * plan.slices[0].num_keys, lse)),
    ),
    "another group that changes dq": (
        "separate gradients",
        "zigzag",
        backward_fault(0, lambda dq, plan: dq * (1 + 2**-7 * _several(plan))),
    ),
    "dq by the order of slices": (
        "gradients in another order",
        "zigzag",
        backward_fault(0, lambda dq, plan: dq * (1 + 2**-7 * _begins_late(plan))),
    ),
    "dv by the order of slices": (
        "gradients in another order",
        "zigzag",
        backward_fault(2, lambda dv, plan: dv * (1 + 0.1 * _begins_late(plan))),
    ),
    "a diagonal at the top left": (
        "split slices",
        "same keys",
        diagonal(lambda piece: piece.num_rows - piece.num_keys),
    ),
    "keys that leak": ("poisoned keys", "gaps", forward_fault(_keys_that_leak)),
    "gradients never written": ("poisoned keys", "gaps", backward_fault(0, _of_slices_only)),
    "noise": ("deterministic", "zigzag", backward_fault(0, lambda dq, _: dq + torch.randn_like(dq))),
    "out of rows off": ("sampled rows", "zigzag", forward_fault(lambda out, lse, *_: (out * 1.02, lse))),
    "lse of rows off": ("sampled rows", "zigzag", forward_fault(lambda out, lse, *_: (out, lse + 0.01))),
    "dq of rows off": ("sampled rows", "zigzag", backward_fault(0, lambda dq, _: dq * 0.95)),
    "dk of keys off": ("sampled keys", "zigzag", backward_fault(1, lambda dk, _: dk * 1.05)),
    "dv of keys off": ("sampled keys", "zigzag", backward_fault(2, lambda dv, _: dv * 1.05)),
    "strides not read": ("strides", "zigzag", input_fault(_packed_rows)),
    **{
        f"{name}, {check} of large inputs": (f"{check} of large inputs", "zigzag", fault)
        for check, faults in _LARGE_FAULTS.items()
        for name, fault in faults.items()
    },
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, layout, plant = FAULTS[fault]
    ALL[check](LAYOUTS[layout], Subject("reference", head_dim=16))
    plant(monkeypatch)

    with pytest.raises(AssertionError):
        ALL[check](LAYOUTS[layout], Subject("reference", head_dim=16))


def test_every_check_has_a_fault_that_it_sees() -> None:
    assert {check for check, _, _ in FAULTS.values()} == set(ALL)


def test_a_compiled_graph_that_differs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    check_compiled(LAYOUTS["zigzag"], Subject("reference"), "aot_eager")
    monkeypatch.setattr(torch, "compile", lambda step, **_: lambda *told: (step(*told)[0] * 2, step(*told)[1]))

    with pytest.raises(AssertionError):
        check_compiled(LAYOUTS["zigzag"], Subject("reference"), "aot_eager")


ENTRIES = st.tuples(*[st.integers(0, 7)] * 4, st.integers(0, 1)).map(
    lambda told: (*sorted(told[:2]), *sorted(told[2:4]), told[4])
)


@given(st.lists(ENTRIES, max_size=3))
def test_the_dense_mask_is_the_definition(entries: list[Entry]) -> None:
    mask = dense_mask(entries, 7, 7)

    assert mask.tolist() == [
        [any(visible(entry, row, key) for entry in entries) for key in range(7)] for row in range(7)
    ]


TRUTH = torch.linspace(1, 2, 16, dtype=torch.float64).reshape(4, 1, 4)


def test_twice_the_error_of_the_low_formula_is_allowed_and_no_more() -> None:
    low = (TRUTH + 0.1).half()
    hold_to_twice("out", TRUTH + 0.14, low, TRUTH)

    with pytest.raises(AssertionError, match="out's rms error"):
        hold_to_twice("out", TRUTH + 0.18, low, TRUTH)
    with pytest.raises(AssertionError, match="out's largest error"):
        hold_to_twice("out", TRUTH + 0.25, low, TRUTH)


def test_an_error_in_small_rows_is_seen_beside_large_ones() -> None:
    truth = torch.cat([TRUTH, TRUTH / 1000])
    low = (truth * 1.01).half()
    found = torch.cat([TRUTH, TRUTH / 1000 * 1.05])
    hold_to_twice("out", found, low, truth)

    with pytest.raises(AssertionError, match="out's largest error over the norm of its row"):
        hold_to_twice("out", found, low, truth, by_row=True)


def test_what_is_not_finite_is_never_near() -> None:
    found = TRUTH.clone()
    found[0, 0, 0] = math.nan

    with pytest.raises(AssertionError, match="out has 1 elements that are not finite"):
        hold_to_twice("out", found, (TRUTH + 10).half(), TRUTH)


def test_a_log_sum_exp_that_is_infinite_elsewhere_is_seen() -> None:
    truth = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    hold_lse(truth.float(), truth)

    with pytest.raises(AssertionError, match="-inf elsewhere"):
        hold_lse(truth.flip(1).float(), truth)


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
def test_the_reference_in_every_setting(head_dim: int, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    layout: Layout = LAYOUTS["masks interleaved"]

    check_precision(layout, Subject("reference", dtype=dtype, heads=heads, head_dim=head_dim))

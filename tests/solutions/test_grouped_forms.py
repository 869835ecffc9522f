"""The other forms of grouped attention on the CPU, by every backend, as on a GPU; and what those checks see."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grouped_forms
import pytest
import torch
from grouped_forms import FORMS
from grouped_layouts import Subject
from varlen_kernels import backends_of_a_gpu

from refgrid_solutions.grouped_attention import grouped_flash_attn_varlen_func, varlen, varlen_groups
from refgrid_solutions.grouped_attention.zigzag import interface
from refgrid_solutions.grouped_attention.zigzag.planned import zigzag_plan

pytestmark = pytest.mark.usefixtures("one_thread")

PLAIN = Subject("reference", head_dim=16)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    zigzag_plan.cache_clear()
    with backends_of_a_gpu(monkeypatch):
        yield
    zigzag_plan.cache_clear()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["reference", "torch", "fa3"])
def test_every_form_of_every_backend(backend: str, form: str) -> None:
    FORMS[form](PLAIN._replace(backend=backend))


def _shifted(*told: Any, **named: Any) -> Any:
    """All but the first sequence's keys begin one key early."""
    rows, keys = varlen_groups(*told, **named)
    return rows, [(max(start - 1, 0), end) for start, end in keys]


def test_keys_of_a_list_that_begin_elsewhere_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_groups", _shifted)

    with pytest.raises(AssertionError, match="out has other bits"):
        FORMS["list form"](PLAIN)


def test_groups_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(*told: Any, **named: Any) -> Any:
        outs, lses = grouped_flash_attn_varlen_func(*told, **named)
        return outs, [lse.flip(1) for lse in lses]

    monkeypatch.setattr(grouped_forms, "grouped_flash_attn_varlen_func", turned)

    with pytest.raises(AssertionError, match="lse has other bits"):
        FORMS["list form"](PLAIN)


def test_slices_that_offsets_do_not_tell_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped_forms, "varlen_groups", _shifted)

    with pytest.raises(AssertionError):
        FORMS["varlen groups"](PLAIN)


@pytest.mark.parametrize("packed", [True, False], ids=["of keys", "of all"])
def test_packed_tensors_taken_apart_wrongly_are_seen(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    true: Any = interface.zigzag_llama3_flash_attn_varlen_func

    def swapped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *told: Any, **named: Any) -> Any:
        wrong = (q.stride(0) == k.stride(0)) is not packed  # q lies in one tensor with k, or not
        return true(q, *((v, k) if wrong else (k, v)), *told, **named)

    monkeypatch.setattr(interface, "zigzag_llama3_flash_attn_varlen_func", swapped)

    with pytest.raises(AssertionError, match="has other bits"):
        FORMS["packed"](PLAIN)

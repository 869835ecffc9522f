"""Adapters for SGLang's norms and for its Triton attention, on doubles of the functions of 0.5.15."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import naive_mla as naive
import pytest
import torch
from adapters import unchanged
from torch import Tensor

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import SOURCES, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TRITON = "sglang.srt.layers.attention.triton_ops"
GQA = ("gqa_paged_decode", "gqa_paged_prefill_causal", "gqa_ragged_prefill_causal")
called: dict[str, Any] = {}


# ---- the doubles


def _rows(buffer: Tensor, indptr: Tensor, indices: Tensor) -> list[Tensor]:
    assert indptr.dtype == torch.int32
    return [buffer[indices[start:end]].double() for start, end in pairwise(indptr.tolist())]


def _no_key_divides_0_by_0(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    none = (lse == -math.inf)[..., None]
    return torch.where(none, math.nan, o), lse * math.log(2)


def decode_attention_fwd(
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    o: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    attn_logits: Tensor,
    attn_lse: Tensor,
    num_kv_splits: Tensor,
    max_kv_splits: int,
    sm_scale: float,
    k_scale: float,
    v_scale: float,
) -> None:
    assert (attn_logits.shape, attn_lse.shape) == ((*q.shape[:2], max_kv_splits, v_buffer.shape[2]), (*q.shape[:2], 1))
    assert attn_logits.dtype == attn_lse.dtype == torch.float32
    assert (num_kv_splits.tolist(), num_kv_splits.dtype) == ([1] * len(q), torch.int32)
    assert (k_buffer.ndim, k_scale, v_scale) == (3, 1.0, 1.0)
    keys, values = (_rows(buffer, kv_indptr, kv_indices) for buffer in (k_buffer, v_buffer))
    output, lse = _no_key_divides_0_by_0(*naive.attention(q.double(), keys, values, [1] * len(q), sm_scale))
    o[:], attn_lse[:, :, 0] = output, lse
    called.update(kv_indices=kv_indices)


def extend_attention_fwd(
    q_extend: Tensor,
    k_extend: Tensor,
    v_extend: Tensor,
    o_extend: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    custom_mask: Tensor | None,
    is_causal: bool,
    mask_indptr: Tensor | None,
    max_len_extend: int,
    k_scale: float,
    v_scale: float,
    sm_scale: float | None = None,
    *,
    lse_extend: Tensor,
) -> None:
    assert custom_mask is mask_indptr is None
    assert (is_causal, k_scale, v_scale) == (True, 1.0, 1.0)
    assert sm_scale is not None
    assert max_len_extend == qo_indptr.diff().max()
    assert len(k_extend) == len(v_extend) == len(q_extend)
    rows = torch.arange(len(q_extend))
    keys, values = (
        [torch.cat(both) for both in zip(_rows(cache, kv_indptr, kv_indices), _rows(new, qo_indptr, rows), strict=True)]
        for cache, new in ((k_buffer, k_extend), (v_buffer, v_extend))
    )
    attended = naive.attention(q_extend.double(), keys, values, qo_indptr.diff().tolist(), sm_scale)
    o_extend[:], lse_extend[:] = _no_key_divides_0_by_0(*attended)
    called.update(kv_indices=kv_indices)


def _rmsnorm(output: Tensor, input: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:  # noqa: A002
    assert not enable_pdl
    output.copy_(torch.nn.functional.rms_norm(input, input.shape[-1:], weight, eps))


def _fused_add_rmsnorm(input: Tensor, residual: Tensor, weight: Tensor, eps: float, enable_pdl: bool) -> None:  # noqa: A002
    residual += input
    _rmsnorm(input, residual, weight, eps, enable_pdl)


def flashinfers(*_: Any, **__: Any) -> None:
    raise AssertionError("this name may lead to FlashInfer's kernel")


NORMS = {
    "rmsnorm": ("Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl", _rmsnorm),
    "fused_add_rmsnorm": (
        "Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl",
        _fused_add_rmsnorm,
    ),
}
MODULES: dict[str, dict[str, Callable[..., Any]]] = {
    f"{TRITON}.decode_attention": {"decode_attention_fwd": decode_attention_fwd},
    f"{TRITON}.extend_attention": {"extend_attention_fwd": extend_attention_fwd},
    "sgl_kernel.elementwise": {},
}


@pytest.fixture(autouse=True)
def _libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang and its kernels as packages of their own, served on the CPU."""
    for path in MODULES:
        folder = tmp_path.joinpath(*path.split("."))
        folder.mkdir(parents=True)
        for package in (folder, *folder.parents[: path.count(".")]):
            (package / "__init__.py").touch()
    (tmp_path / "sglang-0.5.15.dist-info").mkdir()
    head = "Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.15\n"
    (tmp_path / "sglang-0.5.15.dist-info" / "METADATA").write_text(head)
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _theirs(name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    for path, functions in MODULES.items():
        vars(importlib.import_module(path)).update(functions)
    vars(sys.modules["sgl_kernel"]).update(dict.fromkeys(NORMS, flashinfers))
    here = [dataclasses.replace(source, devices=("cpu",)) for source in SOURCES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    groundtruth._outcome.cache_clear()
    yield
    groundtruth._outcome.cache_clear()
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(held)


@pytest.fixture
def _operators() -> Iterator[None]:
    """The operators as sgl_kernel registers them when it is imported."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name, (schema, function) in NORMS.items():
        library.define(f"{name}({schema}) -> ()")
        library.impl(name, function, "CPU")
    yield
    library._destroy()
    for name in NORMS:
        vars(torch.ops.sgl_kernel).pop(name, None)  # what was looked up is kept there


def _theirs(name: str) -> bool:
    ours = name in ("refgrid_groundtruth.sglang.gqa", "refgrid_groundtruth.sglang.norm")
    return ours or name.split(".", maxsplit=1)[0] in ("sglang", "sgl_kernel")


# ---- norms


@pytest.mark.usefixtures("_operators")
@pytest.mark.parametrize("op", NORMS)
def test_norms_pass_their_self_test_and_never_ask_for_the_name_that_flashinfer_may_answer(op: str) -> None:
    assert callable(groundtruth.adapter("sglang", op, "cpu"))


@pytest.mark.usefixtures("_operators")
def test_norms_work_on_copies() -> None:
    norm = importlib.import_module("refgrid_groundtruth.sglang.norm")
    x, residual, weight = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.full((8,), 4.0)
    given = unchanged(norm.fused_add_rmsnorm, hidden_states=x, residual=residual, weight=weight, eps=7.0)
    assert given["output"].tolist() == [[3.0] * 8] * 2
    assert given["residual_out"].tolist() == [[3.0] * 8] * 2
    again = unchanged(norm.rmsnorm, hidden_states=given["residual_out"], weight=weight, eps=7.0)
    assert again["output"].tolist() == [[3.0] * 8] * 2


@pytest.mark.parametrize("op", NORMS)
def test_without_the_operator_it_is_absent(op: str) -> None:
    with pytest.raises(Unavailable, match=f"api-absent: torch has no torch.ops.sgl_kernel.{op}"):
        groundtruth.adapter("sglang", op, "cpu")


# ---- attention


def drawn(op: str, qo_len: list[int], kv_len: list[int], page_size: int, heads: tuple[int, int]) -> dict[str, Any]:
    """Inputs of `op`; pages are shuffled, and what no sequence uses holds NaN."""
    random = torch.Generator().manual_seed(3)
    pages = [-(-keys // page_size) for keys in kv_len]
    indices = torch.randperm(sum(pages) + 2, generator=random)[: sum(pages)]
    k, v = (torch.randn(sum(kv_len), heads[1], 16, generator=random).bfloat16() for _ in "kv")
    q = torch.randn(sum(qo_len), heads[0], 16, generator=random).bfloat16()
    rows = {"qo_indptr": naive.cumulated(qo_len)} if "prefill" in op else {}
    if "ragged" in op:
        return {"q": q, "k": k, "v": v, **rows, "kv_indptr": naive.cumulated(kv_len), "sm_scale": 0.3}
    indptr, caches = naive.cumulated(pages), []
    for x in (k, v):
        cache = torch.full((sum(pages) + 2, page_size, heads[1], 16), math.nan, dtype=x.dtype)
        for first, end, part in zip(indptr.tolist(), indptr[1:].tolist(), x.split(kv_len), strict=False):
            whole = cache[indices[first:end]].flatten(0, 1)
            whole[: len(part)] = part
            cache[indices[first:end]] = whole.view(-1, *cache.shape[1:])
        caches.append(cache)
    last = [keys - (count - 1) * page_size if count else 1 for keys, count in zip(kv_len, pages, strict=True)]
    table = {"kv_indptr": indptr, "kv_indices": indices.int(), "kv_last_page_len": torch.tensor(last).int()}
    if page_size == 1:
        del table["kv_last_page_len"]
    return {"q": q, "k_cache": caches[0], "v_cache": caches[1], **rows, **table, "sm_scale": 0.3}


def expected(qo_len: list[int], kv_len: list[int], heads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Of any op with pages of one token, whose keys are drawn alike."""
    plain = drawn("gqa_ragged_prefill_causal", qo_len, kv_len, 1, heads)
    keys, values = (list(plain[name].double().split(kv_len)) for name in "kv")
    return naive.attention(plain["q"].double(), keys, values, qo_len, 0.3)


@pytest.mark.parametrize("op", GQA)
def test_attention_passes_its_self_test(op: str) -> None:
    assert callable(groundtruth.adapter("sglang", op, "cpu"))


@pytest.mark.parametrize("op", GQA)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("kv_len", [[1], [5, 1, 7], [4, 8, 3]], ids=str)
def test_attention_agrees_with_the_definition(op: str, heads: tuple[int, int], kv_len: list[int]) -> None:
    qo_len = [1] * len(kv_len) if "decode" in op else [max(1, keys // 2) for keys in kv_len]
    inputs = drawn(op, qo_len, kv_len, 1, heads)
    output, lse = expected(qo_len, kv_len, heads)
    given = unchanged(groundtruth.adapter("sglang", op, "cpu"), **inputs)
    assert (given["output"].dtype, given["lse"].dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(given["output"].double(), output, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(given["lse"].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", GQA[:2])
def test_pages_become_slots_in_order(op: str) -> None:
    qo_len, kv_len = [1, 1, 1], [5, 3, 8]
    inputs = drawn(op, qo_len, kv_len, 4, (6, 2))
    given = unchanged(groundtruth.adapter("sglang", op, "cpu"), **inputs)
    pages = inputs["kv_indices"].tolist()
    slots = [[4 * pages[p] + t for p, t in places] for places in (
        [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)],
        [(2, 0), (2, 1), (2, 2)],
        [(3, 0), (3, 1), (3, 2), (3, 3), (4, 0), (4, 1), (4, 2), (4, 3)],
    )]  # fmt: skip
    cached = slots if "decode" in op else [each[:-1] for each in slots]
    assert called["kv_indices"].tolist() == [slot for each in cached for slot in each]
    keys, values = ([inputs[name].flatten(0, 1)[each].double() for each in slots] for name in ("k_cache", "v_cache"))
    output, lse = naive.attention(inputs["q"].double(), keys, values, qo_len, 0.3)
    torch.testing.assert_close(given["output"].double(), output, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(given["lse"].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", GQA[1:])
def test_a_sequence_without_queries_and_one_without_keys_before_are_served(op: str) -> None:
    qo_len, kv_len = [2, 0, 3, 0], [2, 4, 5, 0]
    given = unchanged(groundtruth.adapter("sglang", op, "cpu"), **drawn(op, qo_len, kv_len, 1, (2, 1)))
    output, lse = expected(qo_len, kv_len, (2, 1))
    torch.testing.assert_close(given["output"].double(), output, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(given["lse"].double(), lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("op", "qo_len", "kv_len", "rows"), [
    ("gqa_paged_decode", [1, 1, 1], [3, 0, 0], 2),
    ("gqa_paged_prefill_causal", [2, 5], [2, 3], 2),
    ("gqa_ragged_prefill_causal", [2, 1], [0, 3], 2),
])  # fmt: skip
def test_rows_that_see_no_key_are_declined(op: str, qo_len: list[int], kv_len: list[int], rows: int) -> None:
    with pytest.raises(Unavailable, match=f"unsupported: {rows} rows see no key"):
        groundtruth.adapter("sglang", op, "cpu")(**drawn(op, qo_len, kv_len, 1, (2, 1)))

"""Adapters and oracle of latent and ragged attention: against loops, and on doubles of the kernel libraries."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import naive_mla as naive
import pytest
import torch
from adapters import unchanged

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import Unavailable, paged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Tensors = dict[str, torch.Tensor]

RAGGED = ("gqa_ragged_prefill_causal", "mla_ragged_prefill_causal")
OPS = ("mla_paged_decode", "mla_paged_prefill_causal", *RAGGED)
LENGTHS = [
    pytest.param([1, 4, 2], [5, 4, 9], id="queries at the end"),
    pytest.param([3, 0, 2], [3, 7, 0], id="a sequence without queries, one without keys"),
    pytest.param([5, 2], [3, 0], id="more queries than keys"),
    pytest.param([2, 3], [130, 65], id="several pages of 64"),
]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def all_see_a_key(qo_len: list[int], kv_len: list[int]) -> bool:
    return all(queries <= keys for queries, keys in zip(qo_len, kv_len, strict=True) if queries)


def refusal(source: str, op: str) -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        groundtruth.adapter(source, op, "cpu")
    return caught.value


# ---- what runs on a CPU


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize(("qo_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absorbed_prefill_agrees_with_the_definition(
    qo_len: list[int], kv_len: list[int], page_size: int, dtype: torch.dtype
) -> None:
    inputs = {**naive.draw_paged(qo_len, kv_len, page_size, dtype=dtype), "sm_scale": 0.3}
    output, lse = naive.mla_paged(**inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    for source in ("torch", "oracle"):
        given = unchanged(groundtruth.adapter(source, "mla_paged_prefill_causal", "cpu"), **inputs)
        assert given["output"].dtype == dtype
        close(given["output"], output, tolerance)
    assert given["lse"].dtype == torch.float32
    close(given["lse"], lse, 1e-6)
    eager = groundtruth.adapter("transformers", "mla_paged_prefill_causal", "cpu")
    if all_see_a_key(qo_len, kv_len):
        close(unchanged(eager, **inputs)["output"], output, 3 * tolerance)
    else:
        with pytest.raises(Unavailable, match=r"unsupported: sequence .* defines nothing for a row that sees no key"):
            eager(**inputs)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("kv_len", [[5, 1, 70], [3, 0, 9], [0, 0]], ids=str)
def test_absorbed_decode_agrees_with_the_definition(kv_len: list[int], page_size: int) -> None:
    inputs = naive.draw_paged([1] * len(kv_len), kv_len, page_size, dtype=torch.float32)
    del inputs["qo_indptr"]
    output, lse = naive.mla_paged(**inputs, sm_scale=0.3)

    for source in ("torch", "oracle", *(["transformers"] if all(kv_len) else [])):
        given = unchanged(groundtruth.adapter(source, "mla_paged_decode", "cpu"), **inputs, sm_scale=0.3)
        close(given["output"], output, 1e-5)
        assert ("lse" in given) == (source == "oracle")
        close(given.get("lse", lse), lse, 1e-6)


@pytest.mark.parametrize(("heads", "widths"), [((6, 2), (16, 16)), ((3, 1), (256, 256)), ((2, 2), (192, 128))])
@pytest.mark.parametrize(("qo_len", "kv_len"), LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_prefill_agrees_with_the_definition(
    qo_len: list[int], kv_len: list[int], heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs = {**naive.draw_ragged(qo_len, kv_len, heads=heads, widths=widths, dtype=dtype), "sm_scale": 0.1}
    output, lse = naive.ragged_prefill(**inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    op = RAGGED[widths[0] != widths[1]]

    for source in ("torch", "oracle"):
        given = unchanged(groundtruth.adapter(source, op, "cpu"), **inputs)
        assert given["output"].dtype == dtype
        close(given["output"], output, tolerance)
        assert ("lse" in given) == (source == "oracle" or op == RAGGED[0]), (
            "torch has no lse for keys wider than values"
        )
        close(given.get("lse", lse), lse, 2e-4 if source == "torch" else 1e-6)
    eager = groundtruth.adapter("transformers", op, "cpu")
    if all_see_a_key(qo_len, kv_len):
        close(unchanged(eager, **inputs)["output"], output, 3 * tolerance)
    else:
        with pytest.raises(Unavailable, match="defines nothing for a row that sees no key"):
            eager(**inputs)


def test_tiles_of_a_long_sequence_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = {**naive.draw_paged([11, 6], [9, 20], 4, dtype=torch.float32), "sm_scale": 0.3}
    sources = [groundtruth.adapter(source, "mla_paged_prefill_causal", "cpu") for source in ("torch", "oracle")]
    whole = [source(**inputs)["output"] for source in sources]

    monkeypatch.setattr(paged, "TILE_ROWS", 4)
    monkeypatch.setattr(importlib.import_module("refgrid_groundtruth.oracle.attention"), "SCORES", 100)

    for source, expected in zip(sources, whole, strict=True):
        close(source(**inputs)["output"], expected.double(), 1e-6)


PAGED_FAULTS: list[tuple[str, Callable[[Any], Mapping[str, Any]]]] = [
    ("scale", lambda x: {"sm_scale": x["sm_scale"] * 2}),
    ("swapped pages", lambda x: {"kv_indices": x["kv_indices"].flip(0)}),
    ("a key too few", lambda x: {"kv_last_page_len": x["kv_last_page_len"] - 1}),
    ("a key too many", lambda x: {"kv_last_page_len": x["kv_last_page_len"] + 1}),
    ("no rotary part", lambda x: {"q_pe": x["q_pe"] * 0}),
    ("rotary part alone", lambda x: {"q_nope": x["q_nope"] * 0}),
    ("heads reversed", lambda x: {"q_pe": x["q_pe"].flip(1)}),
    ("value turned", lambda x: {"ckv_cache": x["ckv_cache"].roll(1, 2), "q_nope": x["q_nope"].roll(1, 2)}),
]
RAGGED_FAULTS: list[tuple[str, Callable[[Any], Mapping[str, Any]]]] = [
    ("scale", lambda x: {"sm_scale": x["sm_scale"] * 2}),
    (
        "keys of one sequence",
        lambda x: {"kv_indptr": x["kv_indptr"].clamp(max=0) + torch.tensor([0, 9, 9], dtype=torch.int32)},
    ),
    ("a key moved", lambda x: {"kv_indptr": x["kv_indptr"] + torch.tensor([0, 1, 0], dtype=torch.int32)}),
    ("a query moved", lambda x: {"qo_indptr": x["qo_indptr"] - torch.tensor([0, 1, 0], dtype=torch.int32)}),
    ("query heads reversed", lambda x: {"q": x["q"].flip(1)}),
    ("value heads reversed", lambda x: {"v": x["v"].flip(1)}),
]


@pytest.mark.parametrize(
    ("op", "spoil"),
    [
        pytest.param(op, spoil, id=f"{op}: {name}")
        for op in OPS
        for name, spoil in (RAGGED_FAULTS if op in RAGGED else PAGED_FAULTS)
    ],
)
def test_the_self_test_notices(
    monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    module = importlib.import_module(f"refgrid_groundtruth.oracle.{op[:3]}")
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda **inputs: right(**inputs | spoil(inputs)))

    assert refusal("oracle", op).reason.startswith("self-test failed: got ")


@pytest.mark.parametrize("op", OPS)
def test_the_self_test_notices_an_lse_in_base_e(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    module = importlib.import_module(f"refgrid_groundtruth.oracle.{op[:3]}")
    right = getattr(module, op)

    def spoiled(**inputs: Any) -> Tensors:
        given: Tensors = right(**inputs)
        return {**given, "lse": given["lse"] * math.log(2)}

    monkeypatch.setattr(module, op, spoiled)

    assert refusal("oracle", op).reason.startswith("self-test failed: got lse")

"""PyTorch's adapters, and transformers' norms, against formulas written out."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from adapters import unchanged
from naive_gqa import batch, by_hand, close, lse_bound

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import Unavailable, paged


@pytest.mark.parametrize("source", ["torch", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_agree_with_the_formula(source: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    x, residual, weight = (torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype))
    fused = groundtruth.adapter(source, "fused_add_rmsnorm", "cpu")
    given = unchanged(lambda **inputs: fused(**inputs, eps=0.5), hidden_states=x, residual=residual, weight=weight)
    plain = groundtruth.adapter(source, "rmsnorm", "cpu")(given["residual_out"], weight, eps=0.5)

    total = (x.double() + residual.double()).to(dtype).double()
    expected = weight.double() * total / (total.square().mean(1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(given["residual_out"], total.to(dtype), rtol=0, atol=0)
    close(given["output"], expected, 1e-6 if dtype == torch.float32 else 2**-8)  # one rounding, half an ulp
    assert torch.equal(plain["output"], given["output"])


def test_gemm_multiplies_by_the_transpose_and_leaves_the_setting_as_it_was() -> None:
    torch.manual_seed(7)
    a, b = torch.randn(3, 8, dtype=torch.float16), torch.randn(5, 8, dtype=torch.float16)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True  # the default

    c = unchanged(groundtruth.adapter("torch", "gemm", "cpu"), A=a, B=b)["C"]

    close(c, a.double() @ b.double().T, 2e-3)
    assert matmul.allow_fp16_reduced_precision_reduction is True


def test_gemm_sums_in_float32_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = importlib.import_module("refgrid_groundtruth.torch.gemm")
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(
        module.functional, "linear", lambda *_: seen.append(matmul.allow_fp16_reduced_precision_reduction)
    )

    module.gemm(torch.ones(2, 2), torch.ones(2, 2))

    assert seen == [False]


BATCHES = [
    pytest.param([1, 4, 2], [5, 4, 9], id="queries at the end"),
    pytest.param([3, 0, 2], [3, 7, 0], id="a sequence without queries, one without keys"),
    pytest.param([5, 2], [3, 0], id="more queries than keys"),
    pytest.param([2, 3], [130, 65], id="several pages of 64"),
]


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize(("qo_len", "kv_len"), BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paged_prefill_agrees_with_the_definition(
    qo_len: list[int], kv_len: list[int], page_size: int, dtype: torch.dtype
) -> None:
    inputs = batch(qo_len, kv_len, page_size, dtype)
    output, lse = by_hand(inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    given = unchanged(groundtruth.adapter("torch", "gqa_paged_prefill_causal", "cpu"), **inputs)

    assert given["output"].dtype == dtype
    assert given["lse"].dtype == torch.float32
    close(given["output"], output, tolerance)
    close(given["lse"], lse, lse_bound(dtype))
    eager = groundtruth.adapter("transformers", "gqa_paged_prefill_causal", "cpu")
    if all(queries <= keys for queries, keys in zip(qo_len, kv_len, strict=True) if queries):
        given = unchanged(eager, **inputs)
        assert list(given) == ["output"]
        close(given["output"], output, 3 * tolerance)
    else:
        with pytest.raises(Unavailable, match=r"unsupported: sequence .* defines nothing for a row that sees no key"):
            eager(**inputs)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("kv_len", [[5, 1, 70], [3, 0, 9], [0, 0]], ids=str)
def test_paged_decode_agrees_with_the_definition(kv_len: list[int], page_size: int) -> None:
    inputs = batch([1] * len(kv_len), kv_len, page_size)
    output, lse = by_hand(inputs)
    del inputs["qo_indptr"]

    given = unchanged(groundtruth.adapter("torch", "gqa_paged_decode", "cpu"), **inputs)

    close(given["output"], output, 1e-5)
    close(given["lse"], lse, 1e-5)
    eager = groundtruth.adapter("transformers", "gqa_paged_decode", "cpu")
    if all(kv_len):
        close(unchanged(eager, **inputs)["output"], output, 1e-5)
    else:
        with pytest.raises(Unavailable, match=f"sequence {kv_len.index(0)} has 1 queries but 0 keys"):
            eager(**inputs)


def test_tiles_of_a_long_sequence_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch([11, 6], [9, 20], 4)
    attend = groundtruth.adapter("torch", "gqa_paged_prefill_causal", "cpu")
    whole = attend(**inputs)
    monkeypatch.setattr(paged, "TILE_ROWS", 4)

    tiled = attend(**inputs)

    close(tiled["output"], whole["output"].double(), 1e-6)
    close(tiled["lse"], whole["lse"].double(), 1e-6)


def test_the_largest_tile_comes_first_and_none_has_more_scores_than_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order a GPU's allocator keeps what each leaves, as no later one fits in: 76 GiB at 64K keys."""
    monkeypatch.setattr(paged, "TILE_ROWS", 4)
    monkeypatch.setattr(paged, "SCORES", 3 * 20 * 2)
    q, k, v = torch.zeros(17, 3, 8), torch.zeros(29, 1, 8), torch.zeros(29, 1, 8)

    found = list(paged.tiles(q, k, v, torch.tensor([0, 11, 17]), torch.tensor([9, 20])))

    held = [tile.mask.numel() for tile in found]
    assert held == sorted(held, reverse=True)
    assert [len(tile.k) for tile in found] == [20, 18, 16, 9, 6, 2]
    assert max(held) * 3 <= 3 * 20 * 2
    assert sorted(row for tile in found for row in range(tile.rows.start, tile.rows.stop)) == list(range(17))


def test_only_rows_without_keys_get_minus_infinity() -> None:
    """An lse of exactly 0 is the CPU operator's mark of such a row, and a value like any other elsewhere."""
    inputs = batch([1, 1], [1, 0], 1)
    inputs["q"] = torch.zeros_like(inputs["q"])
    del inputs["qo_indptr"]

    lse = groundtruth.adapter("torch", "gqa_paged_decode", "cpu")(**inputs)["lse"]

    assert lse[0].tolist() == [0.0] * 6
    assert lse[1].tolist() == [-math.inf] * 6

"""Latent and ragged attention against loops in float64, and against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import naive_mla as naive
import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor

from refgrid_references import (
    attention,
    gqa_paged_prefill_causal,
    gqa_ragged_prefill_causal,
    mla_paged_decode,
    mla_paged_prefill_causal,
    mla_ragged_prefill_causal,
)

BFLOAT16 = {"atol": 1e-2, "rtol": 8e-3}  # one rounding, 2^-8 relative, and a margin near zero
FLOAT32 = {"atol": 2e-5, "rtol": 2e-5}

LENGTHS = {  # queries and keys of each sequence
    "one-key": ([1], [1]),
    "no-key": ([2, 1], [0, 0]),
    "no-query": ([0, 0], [3, 0]),
    "an-empty-sequence": ([2, 0, 1], [4, 3, 0]),
    "one-query-each": ([1, 1, 1, 1], [7, 1, 0, 13]),
    "queries-beyond-the-keys": ([5, 3], [3, 3]),
    "past-a-power-of-two": ([3, 1], [65, 129]),
    "many-queries": ([67, 2], [67, 4]),
}
RAGGED = {  # heads of queries and keys, widths of keys and values
    "grouped": ((6, 2), (8, 8)),
    "one-kv-head": ((5, 1), (8, 8)),
    "d256": ((2, 1), (256, 256)),
    "qk192-vo128": ((2, 2), (192, 128)),
    "values-wider": ((2, 2), (4, 12)),
}


@pytest.fixture(params=["as-is", "small-tiles"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's tile, block and chunk sizes, and ones so small that every size above has several of each."""
    if request.param == "small-tiles":
        monkeypatch.setattr(attention, "TILE_ROWS", 3)
        monkeypatch.setattr(attention, "BLOCK_KEYS", 5)
        monkeypatch.setattr(attention, "block_elements", lambda _: 200)


def near(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], output: dict[str, float] = BFLOAT16) -> None:
    """Output and lse, both finite and near or the same non-finite value, position by position."""
    for one, other, tolerance in zip(given, expected, (output, FLOAT32), strict=True):
        torch.testing.assert_close(one.double(), other, equal_nan=True, **tolerance)


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


# --- absorbed, over pages ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize(("qo_len", "kv_len"), LENGTHS.values(), ids=list(LENGTHS))
def test_paged_prefill_is_the_formula(qo_len: list[int], kv_len: list[int], page_size: int) -> None:
    inputs = naive.draw_paged(qo_len, kv_len, page_size)
    before = copied(inputs)

    output, lse = mla_paged_prefill_causal(**inputs, sm_scale=0.3)

    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    near((output, lse), naive.mla_paged(**inputs, sm_scale=0.3))
    unchanged(before, inputs)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("kv_len", [[1], [0], [2, 0, 1], [7, 1, 0, 3, 130]], ids=str)
def test_paged_decode_is_the_formula(kv_len: list[int], page_size: int) -> None:
    inputs = naive.draw_paged([1] * len(kv_len), kv_len, page_size, heads=5)
    del inputs["qo_indptr"]

    near(mla_paged_decode(**inputs, sm_scale=0.3), naive.mla_paged(**inputs, sm_scale=0.3))


def test_the_published_widths_in_float32() -> None:
    inputs = naive.draw_paged([3, 1], [5, 66], 64, heads=2, widths=(512, 64), dtype=torch.float32)

    given = mla_paged_prefill_causal(**inputs, sm_scale=192**-0.5)

    near(given, naive.mla_paged(**inputs, sm_scale=192**-0.5), FLOAT32)


@pytest.mark.parametrize("n", [1, 3, 129, 1031])
def test_equal_scores_average_the_latent_values(n: int) -> None:
    inputs = naive.draw_paged([1], [n], dtype=torch.float32)
    inputs["q_nope"].zero_()
    inputs["q_pe"].zero_()
    output, lse = mla_paged_prefill_causal(**inputs, sm_scale=1.0)

    mean = inputs["ckv_cache"][inputs["kv_indices"].long(), 0].double().mean(0)

    near((output, lse), (mean.expand(1, 4, -1), torch.full((1, 4), math.log2(n)).double()), FLOAT32)


def test_both_parts_of_a_key_count_and_only_one_is_the_value() -> None:
    # Two keys: ckv = (2, 0) and (0, 4), kpe = 1 and 3. With sm_scale ln 2, lse = log2(2^s0 + 2^s1).
    caches = {
        "ckv_cache": torch.tensor([[[2.0, 0.0]], [[0.0, 4.0]]]),
        "kpe_cache": torch.tensor([[[1.0]], [[3.0]]]),
        "kv_indptr": torch.tensor([0, 2]),
        "kv_indices": torch.tensor([0, 1]),
    }
    for nope, pe, scores in (((1.0, 0.0), 0.0, (2, 0)), ((0.0, 0.0), 1.0, (1, 3)), ((0.5, 0.75), -2.0, (-1, -3))):
        q_nope, q_pe = torch.tensor([[nope]]), torch.tensor([[[pe]]])
        output, lse = mla_paged_decode(q_nope, q_pe, **caches, sm_scale=math.log(2))
        total = 2.0 ** scores[0] + 2.0 ** scores[1]

        assert lse.item() == pytest.approx(math.log2(total), rel=1e-6)
        assert output.flatten().tolist() == pytest.approx([2 * 2.0 ** scores[0] / total, 4 * 2.0 ** scores[1] / total])


def test_one_key_returns_its_latent_value() -> None:
    inputs = naive.draw_paged([1, 1], [1, 1])

    output, _ = mla_paged_prefill_causal(**inputs, sm_scale=0.5)

    assert torch.equal(output, inputs["ckv_cache"][inputs["kv_indices"].long()].expand(-1, 4, -1))


@pytest.mark.usefixtures("cut")
def test_a_rotary_part_that_is_nan_reaches_just_the_queries_that_see_it() -> None:
    inputs = naive.draw_paged([6, 4], [6, 4])
    clean = mla_paged_prefill_causal(**inputs, sm_scale=0.5)
    inputs["kpe_cache"][inputs["kv_indices"][3].long(), 0, 2] = math.nan  # key 3 of the first sequence

    given = mla_paged_prefill_causal(**inputs, sm_scale=0.5)

    for one, expected in zip(given, clean, strict=True):
        expected[3:6] = math.nan
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-2, equal_nan=True)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_hidden_latent_value_adds_nothing(value: float) -> None:
    inputs = naive.draw_paged([4], [4])
    clean, _ = mla_paged_prefill_causal(**inputs, sm_scale=0.5)
    inputs["ckv_cache"][inputs["kv_indices"][3].long(), 0, 2] = value  # the last key: the last query alone sees it

    output, _ = mla_paged_prefill_causal(**inputs, sm_scale=0.5)

    torch.testing.assert_close(output[:3], clean[:3], rtol=0, atol=1e-2)
    assert not torch.isfinite(output[3]).all()


# --- in a row ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize(("heads", "widths"), RAGGED.values(), ids=list(RAGGED))
@pytest.mark.parametrize(("qo_len", "kv_len"), LENGTHS.values(), ids=list(LENGTHS))
def test_ragged_prefill_is_the_formula(
    qo_len: list[int], kv_len: list[int], heads: tuple[int, int], widths: tuple[int, int]
) -> None:
    inputs = naive.draw_ragged(qo_len, kv_len, heads=heads, widths=widths)
    before = copied(inputs)
    function = gqa_ragged_prefill_causal if widths[0] == widths[1] else mla_ragged_prefill_causal

    output, lse = function(**inputs, sm_scale=0.1)

    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    near((output, lse), naive.ragged_prefill(**inputs, sm_scale=0.1))
    unchanged(before, inputs)


def test_ragged_in_float32_agrees_with_float64_closely() -> None:
    inputs = naive.draw_ragged([5, 0, 9], [30, 4, 7], widths=(24, 16), dtype=torch.float32)

    given = mla_ragged_prefill_causal(**inputs, sm_scale=1.7)

    near(given, naive.ragged_prefill(**inputs, sm_scale=1.7), FLOAT32)


def test_ragged_is_paged_in_order() -> None:
    inputs = naive.draw_ragged([5, 3], [30, 7])
    paged = {"k_cache": inputs["k"][:, None], "v_cache": inputs["v"][:, None], "kv_indices": torch.arange(37)}
    rest = {name: inputs[name] for name in ("q", "qo_indptr", "kv_indptr")}

    one, other = (
        gqa_ragged_prefill_causal(**inputs, sm_scale=0.5),
        gqa_paged_prefill_causal(**rest, **paged, sm_scale=0.5),
    )

    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_equal_scores_average_the_values_before_the_diagonal() -> None:
    inputs = naive.draw_ragged([3], [3], heads=(1, 1), widths=(2, 1), dtype=torch.float32)
    inputs["q"].zero_()
    inputs["v"][:, 0, 0] = torch.tensor([1.0, 5.0, 12.0])

    output, lse = mla_ragged_prefill_causal(**inputs, sm_scale=1.0)

    assert output.flatten().tolist() == pytest.approx([1.0, 3.0, 6.0])
    assert lse.flatten().tolist() == pytest.approx([0.0, 1.0, math.log2(3)])


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
def test_no_sequence_at_all_gives_empty_outputs(heads: tuple[int, int]) -> None:
    output, lse = mla_ragged_prefill_causal(**naive.draw_ragged([], [], heads=heads, widths=(6, 4)), sm_scale=1.0)
    assert (output.shape, lse.shape) == ((0, 2, 4), (0, 2))

    output, lse = mla_paged_prefill_causal(**naive.draw_paged([], []), sm_scale=1.0)
    assert (output.shape, lse.shape) == ((0, 4, 16), (0, 4))


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 70])
def test_a_cache_of_a_million_pages_is_not_copied(queries: int) -> None:
    pages, keys = 989_669, 4000
    inputs = {
        "q_nope": torch.ones(queries, 16, 512, dtype=torch.bfloat16),
        "q_pe": torch.ones(queries, 16, 64, dtype=torch.bfloat16),
        "ckv_cache": torch.empty(pages, 1, 512, dtype=torch.bfloat16),  # never touched but in what is used
        "kpe_cache": torch.empty(pages, 1, 64, dtype=torch.bfloat16),
        "qo_indptr": naive.cumulated([queries]),
        "kv_indptr": naive.cumulated([keys]),
        "kv_indices": (torch.arange(keys) * 247).int(),
    }
    inputs["ckv_cache"][inputs["kv_indices"].long()] = 1
    inputs["kpe_cache"][inputs["kv_indices"].long()] = 1

    assert peak_bytes(lambda: mla_paged_prefill_causal(**inputs, sm_scale=0.1)) < 2**26


@pytest.mark.parametrize(("heads", "widths"), [((8, 2), (128, 128)), ((4, 4), (192, 128))])
def test_ragged_takes_less_than_four_times_its_inputs_and_outputs(
    heads: tuple[int, int], widths: tuple[int, int]
) -> None:
    inputs = naive.draw_ragged([2048] * 4, [4096] * 4, heads=heads, widths=widths)
    held = sum(tensor.nbytes for tensor in inputs.values()) + 8192 * heads[0] * (2 * widths[1] + 4)

    assert peak_bytes(lambda: mla_ragged_prefill_causal(**inputs, sm_scale=0.1)) < 4 * held


def test_equal_inputs_give_equal_bits() -> None:
    inputs = naive.draw_paged([3, 1], [5, 66], 64)

    first, again = (mla_paged_prefill_causal(**inputs, sm_scale=0.1) for _ in range(2))

    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])

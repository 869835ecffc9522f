"""Sparse attention and its indexer against loops in float64, and against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import naive_dsa as naive
import pytest
import torch
from peak_memory import peak_bytes
from torch import Tensor

from refgrid.proving.chosen import compare_chosen
from refgrid.proving.tolerance import EXACT, Tolerance
from refgrid_references import dsa, dsa_sparse_attention, dsa_topk_indexer_fp8

BFLOAT16 = {"atol": 1e-2, "rtol": 8e-3}  # one rounding, 2^-8 relative, and a margin near zero
FLOAT32 = {"atol": 2e-5, "rtol": 2e-5}
NEAR = Tolerance(1e-5, 1e-5)

COUNTS = {  # keys of each token, of a topk of 8 and 20 slots
    "one-key": [1],
    "no-key": [0, 0],
    "all": [8, 8, 8],
    "a-token-without-keys": [3, 0, 8, 1],
    "ascending": [1, 2, 3, 4, 5, 6, 7, 8],
    "no-token": [],
}


@pytest.fixture(params=["as-is", "small-chunks", "one-at-a-time"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's chunk size, one that holds two or three tokens or pages, and one that holds none whole."""
    if request.param != "as-is":
        elements = {"small-chunks": 3000, "one-at-a-time": 1}[request.param]
        monkeypatch.setattr(dsa, "block_elements", lambda _: elements)


def near(given: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], output: dict[str, float] = BFLOAT16) -> None:
    """Output and lse, both finite and near or the same non-finite value, position by position."""
    for one, other, tolerance in zip(given, expected, (output, FLOAT32), strict=True):
        torch.testing.assert_close(one.double(), other, equal_nan=True, **tolerance)


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, tensor in after.items():
        kept = before[name]
        assert torch.equal(tensor.view(torch.uint8), kept.view(torch.uint8)), name


# --- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("place", ["behind", "before", "among"])
@pytest.mark.parametrize("page_size", [1, 4, 20])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=list(COUNTS))
def test_attention_is_the_formula(counts: list[int], page_size: int, place: str) -> None:
    inputs = naive.draw_attention(counts, page_size, topk=8, slots=20)
    if place != "among":  # of the other keys stands none
        inputs["sparse_indices"] = inputs["sparse_indices"].sort(dim=1, descending=place == "behind").values
    before = copied(inputs)

    output, lse = dsa_sparse_attention(**inputs, sm_scale=0.3)

    assert (output.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (output.shape, lse.shape) == (inputs["q_nope"].shape, inputs["q_nope"].shape[:2])
    near((output, lse), naive.sparse_attention(**inputs, sm_scale=0.3))
    unchanged(before, inputs)


def test_the_published_widths_in_float32() -> None:
    inputs = naive.draw_attention(
        [33, 0, 65, 70], 64, topk=70, slots=128, heads=2, widths=(512, 64), dtype=torch.float32
    )

    given = dsa_sparse_attention(**inputs, sm_scale=192**-0.5)

    near(given, naive.sparse_attention(**inputs, sm_scale=192**-0.5), FLOAT32)


@pytest.mark.usefixtures("cut")
def test_a_token_without_keys_gives_zero_and_minus_infinity_beside_nan() -> None:
    inputs = naive.draw_attention([0, 5, 0], 4)
    for cache in ("ckv_cache", "kpe_cache"):
        inputs[cache].fill_(1.0)
        inputs[cache][0, 0] = inputs[cache][-1, -1] = math.nan  # where -1 might be looked for
    inputs["sparse_indices"][1, :5] = torch.tensor([1, 2, -1, 22, 5])
    inputs["sparse_indices"][1, 5:] = -1

    output, lse = dsa_sparse_attention(**inputs, sm_scale=0.3)

    assert not output[[0, 2]].any()
    assert (lse[[0, 2]] == -math.inf).all()
    assert output[1].isfinite().all()
    assert lse[1].isfinite().all()


@pytest.mark.usefixtures("cut")
def test_the_first_and_the_last_slot_are_like_any_other() -> None:
    inputs = naive.draw_attention([0] * 4, 4, topk=3, slots=20, dtype=torch.float32)
    for slot, value in ((0, 2.0), (3, 5.0), (4, 7.0), (19, 11.0)):  # the ends of the first page and of the cache
        inputs["ckv_cache"][divmod(slot, 4)] = value
        inputs["kpe_cache"][divmod(slot, 4)] = 0.0
    inputs["sparse_indices"][:, 1] = torch.tensor([0, 3, 4, 19])
    inputs["q_nope"].zero_()

    output, lse = dsa_sparse_attention(**inputs, sm_scale=0.3)

    assert torch.equal(output, torch.tensor([2.0, 5.0, 7.0, 11.0])[:, None, None].expand_as(output))
    assert torch.equal(lse, torch.zeros_like(lse))


def test_both_parts_of_a_key_count_and_only_one_is_the_value() -> None:
    # Two keys of four: ckv = (2, 0) and (0, 4), kpe = 1 and 3. With sm_scale ln 2, lse = log2(2^s0 + 2^s1).
    ckv = torch.full((2, 2, 2), math.nan)
    kpe = torch.full((2, 2, 1), math.nan)
    ckv[0, 1], kpe[0, 1] = torch.tensor([2.0, 0.0]), 1.0
    ckv[1, 0], kpe[1, 0] = torch.tensor([0.0, 4.0]), 3.0
    indices = torch.tensor([[-1, 2, -1, 1]], dtype=torch.int32)
    for nope, pe, scores in (((1.0, 0.0), 0.0, (2, 0)), ((0.0, 0.0), 1.0, (1, 3)), ((0.5, 0.75), -2.0, (-1, -3))):
        q_nope, q_pe = torch.tensor([[nope]]), torch.tensor([[[pe]]])
        output, lse = dsa_sparse_attention(q_nope, q_pe, ckv, kpe, indices, sm_scale=math.log(2))
        total = 2.0 ** scores[0] + 2.0 ** scores[1]

        assert lse.item() == pytest.approx(math.log2(total), rel=1e-6)
        assert output.flatten().tolist() == pytest.approx([2 * 2.0 ** scores[0] / total, 4 * 2.0 ** scores[1] / total])


def test_the_order_of_indices_means_nothing() -> None:
    inputs = naive.draw_attention([5, 8, 1], topk=8, dtype=torch.float32)
    given = dsa_sparse_attention(**inputs, sm_scale=0.7)
    inputs["sparse_indices"] = inputs["sparse_indices"][:, torch.randperm(8)]

    for one, other in zip(dsa_sparse_attention(**inputs, sm_scale=0.7), given, strict=True):
        torch.testing.assert_close(one, other, **FLOAT32)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("cache", ["ckv_cache", "kpe_cache"])
def test_nan_in_a_slot_reaches_just_the_tokens_that_chose_it(cache: str) -> None:
    inputs = naive.draw_attention([8, 8, 3, 0], 4, topk=8, slots=8)
    inputs["sparse_indices"][1, inputs["sparse_indices"][1] == 5] = -1
    clean = dsa_sparse_attention(**inputs, sm_scale=0.5)
    inputs[cache][1, 1] = math.nan
    chose = (inputs["sparse_indices"] == 5).any(1)

    given = dsa_sparse_attention(**inputs, sm_scale=0.5)

    assert chose.tolist()[:2] == [True, False]
    for one, expected in zip(given, clean, strict=True):
        assert one[chose].isnan().all()
        torch.testing.assert_close(one[~chose], expected[~chose], rtol=0, atol=1e-2)


def test_large_scores_do_not_overflow() -> None:
    inputs = naive.draw_attention([7, 1, 0], dtype=torch.float32)

    given = dsa_sparse_attention(**inputs, sm_scale=300.0)

    assert given[0].isfinite().all()
    expected = naive.sparse_attention(**inputs, sm_scale=300.0)
    torch.testing.assert_close(given[1].double(), expected[1], rtol=1e-5, atol=0)


def test_a_cache_of_a_million_pages_is_not_cast() -> None:
    pages, tokens, topk = 989_669, 16, 2048
    inputs = {
        "q_nope": torch.ones(tokens, 16, 512, dtype=torch.bfloat16),
        "q_pe": torch.ones(tokens, 16, 64, dtype=torch.bfloat16),
        "ckv_cache": torch.empty(pages, 1, 512, dtype=torch.bfloat16),  # never touched but in what is used
        "kpe_cache": torch.empty(pages, 1, 64, dtype=torch.bfloat16),
        "sparse_indices": (torch.arange(topk) * 483).int().expand(tokens, -1),
    }
    for cache in ("ckv_cache", "kpe_cache"):
        inputs[cache][inputs["sparse_indices"][0].long()] = 1

    assert peak_bytes(lambda: dsa_sparse_attention(**inputs, sm_scale=0.1)) < 2**26


# --- indexer ------------------------------------------------------------------------------------------------------


def chosen(inputs: dict[str, Any], topk: int, tolerance: Tolerance = NEAR) -> Tensor:
    """What the reference chooses, once it was held against the loops' scores."""
    indices = dsa_topk_indexer_fp8(**inputs, topk=topk)
    assert (indices.dtype, list(indices.shape)) == (torch.int32, [len(inputs["seq_lens"]), topk])
    if indices.numel():
        found = compare_chosen("topk_indices", indices, naive.index_scores(**inputs), tolerance)
        assert found.matches, found.describe()
    return indices


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("topk", [1, 7, 20, 33])
@pytest.mark.parametrize("lengths", [[1], [0], [0, 0], [3, 0, 20, 1], [4, 5, 8, 9, 19, 20], []], ids=str)
def test_the_keys_of_highest_score_are_chosen(lengths: list[int], topk: int) -> None:
    inputs = naive.draw_index(lengths)
    before = copied(inputs)

    indices = chosen(inputs, topk)

    for row, length in zip(indices.tolist(), lengths, strict=True):
        fill = max(0, topk - length)
        assert row[topk - fill :] == [-1] * fill
        assert -1 not in row[: topk - fill]
    unchanged(before, inputs)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("topk", [5, 64, 130])
def test_lengths_around_a_page_of_64_and_the_published_width(topk: int) -> None:
    chosen(naive.draw_index([0, 1, 63, 64, 65, 129], page_size=64, d=128, heads=2, room=3, pages=10), topk)


def test_a_row_of_the_table_is_read_as_far_as_its_sequence_goes() -> None:
    inputs = naive.draw_index([5, 0, 8])
    given = chosen(inputs, 9)
    for padding in (-1, 2**31 - 1, -(2**31), 0):
        for row, used in enumerate((2, 0, 2)):
            inputs["block_table"][row, used:] = padding

        assert torch.equal(dsa_topk_indexer_fp8(**inputs, topk=9), given), padding


def test_keys_beyond_a_sequence_on_its_last_page_count_nothing() -> None:
    inputs = naive.draw_index([5, 2])
    given = chosen(inputs, 9)
    for row, place in ((0, 1), (1, 2)):
        page = inputs["k_index_cache_fp8"][inputs["block_table"][row, 1 - row]].view(-1)
        page[place * 8 : 32] = 0x7E  # the largest number, and as large a scale
        page[32 + place * 4 :].view(torch.float32).fill_(1e30)

    assert torch.equal(dsa_topk_indexer_fp8(**inputs, topk=9), given)


def test_either_of_equal_scores_will_do_but_each_slot_once() -> None:
    inputs = naive.draw_index([20, 9, 3])
    inputs["weights"].zero_()

    for topk in (1, 6, 20):
        indices = chosen(inputs, topk, EXACT)
        for row in indices.tolist():
            named = [index for index in row if index >= 0]
            assert len(set(named)) == len(named)


def test_scores_are_a_weighted_sum_of_what_is_positive() -> None:
    # One page of four keys of one number: 1, 2, -4 and 3, scaled by 1, 2, 1 and 1/2; heads 1 and -1, weights 2 and w.
    cache = torch.zeros(1, 32, dtype=torch.uint8)
    cache[0, :16:4] = torch.tensor([1.0, 2.0, -4.0, 3.0]).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[0, 16:] = torch.tensor([1.0, 2.0, 1.0, 0.5]).view(torch.uint8)
    q = torch.tensor([[[1.0, 0, 0, 0], [-1.0, 0, 0, 0]]]).to(torch.float8_e4m3fn)
    for w, scores in ((1.0, [2, 8, 4, 3]), (-3.0, [2, 8, -12, 3]), (0.25, [2, 8, 1, 3])):
        inputs = (q, cache.view(torch.int8).view(1, 4, 1, 8), torch.tensor([[2.0, w]]))
        lens, table = torch.tensor([4], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)

        assert dsa.index_scores(*inputs, lens, table).tolist() == [scores]
        best = sorted(range(4), key=lambda slot: -scores[slot])
        assert dsa_topk_indexer_fp8(*inputs, lens, table, topk=3)[0].tolist() == best[:3]


@pytest.mark.parametrize(("page_size", "d"), [(4, 64), (64, 128), (1, 256)])
def test_pages_are_unpacked_to_the_bit(page_size: int, d: int) -> None:
    codes = torch.arange(page_size * d * 3, dtype=torch.int32) * 37 % 256  # every byte, also those of NaN
    scales = torch.tensor([2.0**-10, 1.0, -3.5, 2.0**20], dtype=torch.float32).repeat(page_size)[: 3 * page_size]
    scales = scales.repeat(3)[: 3 * page_size].view(3, page_size)
    cache = torch.cat([codes.to(torch.uint8).view(3, -1), scales.view(torch.uint8)], dim=1).view(torch.int8)
    cache = cache.view(3, page_size, 1, d + 4)

    given = dsa.unpack_pages(cache, torch.tensor([2, 0, 2]), d)

    for page, keys in zip((2, 0, 2), given, strict=True):
        raw = cache[page].flatten().view(torch.uint8).numpy().tobytes()
        expected = torch.tensor([naive.key(raw, place, page_size, d) for place in range(page_size)])
        torch.testing.assert_close(keys, expected, rtol=0, atol=0, equal_nan=True)
    assert len(codes.unique()) == 256


def test_an_indexer_s_cache_of_many_pages_is_not_cast() -> None:
    pages, room = 200_000, 64
    inputs = {
        "q_index_fp8": torch.ones(8, 64, 128).to(torch.float8_e4m3fn),
        "k_index_cache_fp8": torch.empty(pages, 64, 1, 132, dtype=torch.int8),  # never touched but in what is used
        "weights": torch.ones(8, 64),
        "seq_lens": torch.full((8,), room * 64, dtype=torch.int32),
        "block_table": (torch.arange(8 * room) * 389).int().view(8, room),
    }
    inputs["k_index_cache_fp8"][inputs["block_table"].flatten().long()] = 0

    assert peak_bytes(lambda: dsa_topk_indexer_fp8(**inputs, topk=2048)) < 2**26

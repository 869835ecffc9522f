"""Grouped attention against a dense mask in float64, and against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import naive_grouped as naive
import pytest
import torch
from peak_memory import peak_bytes

from refgrid_references import gqa_grouped, gqa_ragged_prefill_causal, grouped

BFLOAT16 = {"atol": 1e-2, "rtol": 8e-3}  # one rounding, 2^-8 relative, and a margin near zero
FLOAT32 = {"atol": 2e-5, "rtol": 2e-5}
FULL, CAUSAL = 0, 1

# Queries, keys, and the slices.
SLICES: dict[str, tuple[int, int, list[naive.Entry]]] = {
    "one-key": (1, 1, [(0, 1, 0, 1, CAUSAL)]),
    "no-slice": (3, 4, []),
    "no-key-at-all": (3, 0, [(0, 1, 0, 0, FULL), (1, 3, 0, 0, CAUSAL)]),
    "overlapping": (9, 20, [(0, 4, 3, 17, FULL), (4, 9, 1, 12, CAUSAL)]),
    "the-same-keys": (8, 11, [(i, i + 2, 2, 9, FULL) for i in range(0, 8, 2)]),
    "gaps-and-no-order": (12, 15, [(9, 11, 0, 5, CAUSAL), (1, 4, 7, 15, FULL), (5, 5, 2, 9, CAUSAL)]),
    "more-queries-than-keys": (10, 9, [(0, 6, 5, 8, CAUSAL), (7, 10, 1, 2, CAUSAL)]),
    "an-empty-range-of-keys": (6, 9, [(0, 3, 4, 4, FULL), (3, 6, 4, 4, CAUSAL)]),
    "singles": (7, 33, [(i, i + 1, 32 - 4 * i, 33, i % 2) for i in range(6, -1, -2)]),
    "zigzag": (16, 64, [(0, 8, 0, 16, CAUSAL), (8, 16, 0, 56, CAUSAL)]),
    "past-a-power-of-two": (132, 300, [(1, 68, 17, 274, CAUSAL), (68, 131, 3, 260, FULL)]),
}


def drawn(
    case: str, heads: tuple[int, int] = (6, 2), d: int = 8, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Any]:
    """The inputs; a key that no query sees is 1e4."""
    total_q, total_k, entries = SLICES[case]
    generator = torch.Generator().manual_seed(0)
    sizes = ((total_q, heads[0]), (total_k, heads[1]), (total_k, heads[1]))
    q, k, v = (torch.randn(*size, d, generator=generator).to(dtype) for size in sizes)
    unseen = ~naive.dense_mask(entries, total_q, total_k).any(0)
    k[unseen] = v[unseen] = 1e4
    table = torch.tensor(entries, dtype=torch.int32).reshape(-1, 5)
    ranges = {"q_ranges": table[:, :2], "k_ranges": table[:, 2:4], "mask_types": table[:, 4]}
    return {"q": q, "k": k, "v": v, **ranges}


def dense(inputs: dict[str, Any], sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, lse [total_q, heads] and base 2; built from the slices one key and query at a time."""
    entries = [(*q, *k, m) for q, k, m in zip(*(inputs[name].tolist() for name in RANGES), strict=True)]
    rows, keys = range(len(inputs["q"])), range(len(inputs["k"]))
    seen = [[any(naive.visible(entry, i, j) for entry in entries) for j in keys] for i in rows]
    mask = torch.tensor(seen, dtype=torch.bool).reshape(len(rows), len(keys))
    q, k, v = (inputs[name].double() for name in "qkv")
    out, lse = naive.attend(q, k, v, mask, sm_scale)
    return out, lse.T / math.log(2)


RANGES = ("q_ranges", "k_ranges", "mask_types")


def near(given: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], output: dict[str, float]) -> None:
    for one, other, tolerance in zip(given, expected, (output, FLOAT32), strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.fixture(params=["as-is", "small-tiles"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tile, block and chunk sizes, and ones so small that the sizes above have several of each."""
    if request.param == "small-tiles":
        monkeypatch.setattr(grouped, "TILE_ROWS", 3)
        monkeypatch.setattr(grouped, "BLOCK_KEYS", 5)
        monkeypatch.setattr(grouped, "block_elements", lambda _: 200)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("case", SLICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BFLOAT16), (torch.float32, FLOAT32)], ids=str)
def test_grouped_attention_is_the_formula(case: str, dtype: torch.dtype, tolerance: dict[str, float]) -> None:
    inputs = drawn(case, dtype=dtype)
    before = {name: value.clone() for name, value in inputs.items()}

    output, lse = gqa_grouped(**inputs, sm_scale=0.3)

    assert (output.dtype, lse.dtype) == (dtype, torch.float32)
    near((output, lse), dense(inputs, 0.3), tolerance)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())


def test_the_slices_stand_in_no_order() -> None:
    inputs = drawn("gaps-and-no-order")
    turned = {**inputs, **{name: inputs[name].flip(0) for name in RANGES}}

    one, other = gqa_grouped(**inputs, sm_scale=0.5), gqa_grouped(**turned, sm_scale=0.5)

    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_causal_slices_side_by_side_are_ragged_prefill_bit_by_bit() -> None:
    inputs, indptr = (
        drawn("overlapping"),
        torch.tensor([0, 2, 2, 9]),
    )
    kv_indptr = torch.tensor([0, 7, 12, 20])
    sides = {"q_ranges": indptr, "k_ranges": kv_indptr}
    inputs |= {name: torch.stack([each[:-1], each[1:]], 1).int() for name, each in sides.items()}
    inputs["mask_types"] = torch.ones(3, dtype=torch.int32)

    one = gqa_grouped(**inputs, sm_scale=0.5)
    other = gqa_ragged_prefill_causal(inputs["q"], inputs["k"], inputs["v"], indptr, kv_indptr, sm_scale=0.5)

    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def test_equal_scores_average_what_is_seen() -> None:
    q, k = torch.zeros(3, 1, 2), torch.ones(4, 1, 2)
    v = torch.tensor([1.0, 3.0, 8.0, 1e4])[:, None, None].expand(-1, -1, 2)
    ranges = {"q_ranges": torch.tensor([[1, 3]]), "k_ranges": torch.tensor([[0, 3]]), "mask_types": torch.tensor([1])}

    output, lse = gqa_grouped(q, k, v, **ranges, sm_scale=1.0)

    assert output[:, 0, 0].tolist() == [0, 2, 4]
    torch.testing.assert_close(lse[:, 0], torch.tensor([-math.inf, 1, math.log2(3)]))


def test_a_long_range_takes_no_memory_of_scores() -> None:
    inputs = drawn("singles", heads=(8, 1), d=64)
    inputs["q"] = torch.randn(512, 8, 64).bfloat16()
    inputs["k"] = inputs["v"] = torch.randn(8192, 1, 64).bfloat16()
    inputs |= {
        "q_ranges": torch.tensor([[0, 512]]),
        "k_ranges": torch.tensor([[0, 8192]]),
        "mask_types": torch.tensor([0]),
    }

    assert peak_bytes(lambda: gqa_grouped(**inputs, sm_scale=0.1)) < 512 * 8192 * 8 * 4 / 3

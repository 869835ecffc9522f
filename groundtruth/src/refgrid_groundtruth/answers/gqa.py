"""Attention with equal scores, whose output is a mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

# Two sequences on pages of 4 slots: 6 keys on pages 3 and 1, out of order, and 3 keys on page 2. Page 0 is unused.
PAGES, KEYS, PAGE_SIZE, QO_HEADS, KV_HEADS, HEAD_DIM = ((3, 1), (2,)), (6, 3), 4, 8, 2, 128
SM_SCALE = 0.125


def _value(sequence: int, position: int, head: int) -> float:
    return 2.0 * position + 16 * head + 5 * sequence


def _cache() -> dict[str, torch.Tensor]:
    """k is 1 in the first component and v tells where it lies; what no sequence uses is NaN."""
    k = torch.full((4, PAGE_SIZE, KV_HEADS, HEAD_DIM), math.nan, dtype=torch.bfloat16)
    v = k.clone()
    for sequence, (pages, keys) in enumerate(zip(PAGES, KEYS, strict=True)):
        for position in range(keys):
            slot = pages[position // PAGE_SIZE], position % PAGE_SIZE
            k[slot] = torch.eye(1, HEAD_DIM)
            for head in range(KV_HEADS):
                v[slot][head] = _value(sequence, position, head)
    return {"k_cache": k, "v_cache": v}


def _attention(rows: list[tuple[int, int]], **indptr: torch.Tensor) -> Answer:
    """For each row its sequence and how many keys it sees.

    Head h scores each key SM_SCALE * h, so the weights are uniform: the output is the mean of the values seen and lse =
    log2(keys) + SM_SCALE * h * log2(e).
    """
    q = torch.zeros(len(rows), QO_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    q[:, :, 0] = torch.arange(QO_HEADS)
    group = QO_HEADS // KV_HEADS
    mean = [[sum(_value(s, j, h // group) for j in range(n)) / n for h in range(QO_HEADS)] for s, n in rows]
    lse = [[math.log2(n) + SM_SCALE * h * math.log2(math.e) for h in range(QO_HEADS)] for _, n in rows]
    table = {
        "kv_indptr": torch.tensor([0, 2, 3], dtype=torch.int32),
        "kv_indices": torch.tensor([page for pages in PAGES for page in pages], dtype=torch.int32),
        "kv_last_page_len": torch.tensor([2, 3], dtype=torch.int32),
    }
    given = {"q": q, **_cache(), **indptr, **table, "sm_scale": SM_SCALE}
    output = torch.tensor(mean)[:, :, None].expand(-1, -1, HEAD_DIM).to(torch.bfloat16)
    return given, {"output": output, "lse": torch.tensor(lse, dtype=torch.float32)}


def _gqa_paged_decode() -> Answer:
    return _attention([(0, 6), (1, 3)])


def _gqa_paged_prefill_causal() -> Answer:
    """Three queries at the end of the first sequence, one at the end of the second."""
    indptr = torch.tensor([0, 3, 4], dtype=torch.int32)
    return _attention([(0, 4), (0, 5), (0, 6), (1, 3)], qo_indptr=indptr)


def _gqa_ragged_prefill_causal() -> Answer:
    """The same rows; keys and values in a row instead of on pages."""
    given, expected = _gqa_paged_prefill_causal()
    places = [(pages[j // PAGE_SIZE], j % PAGE_SIZE) for pages, n in zip(PAGES, KEYS, strict=True) for j in range(n)]
    k, v = (torch.stack([given[name][place] for place in places]) for name in ("k_cache", "v_cache"))
    kv_indptr = torch.tensor([0, *KEYS], dtype=torch.int32).cumsum(0).int()
    kept = {name: given[name] for name in ("q", "qo_indptr", "sm_scale")}
    return {**kept, "k": k, "v": v, "kv_indptr": kv_indptr}, expected


CASES: dict[str, Callable[[], Answer]] = {
    "gqa_paged_decode": _gqa_paged_decode,
    "gqa_paged_prefill_causal": _gqa_paged_prefill_causal,
    "gqa_ragged_prefill_causal": _gqa_ragged_prefill_causal,
}

"""Latent attention with equal scores, whose output is a mean; of the widths that kernels are built for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

# Two sequences on pages of 64 slots, as FlashMLA wants them: 66 keys on pages 3 and 1, out of order, and 3 keys on page
# 2. Page 0 is unused.
PAGES, KEYS, PAGE_SIZE, HEADS = ((3, 1), (2,)), (66, 3), 64, 16
CKV, KPE, QK, VO = 512, 64, 192, 128
SM_SCALE = 0.0625


def _value(sequence: int, position: int) -> float:
    return 2.0 * position + 5 * sequence


def _log(keys: int, score: float) -> float:
    return math.log2(keys) + SM_SCALE * score * math.log2(math.e)


def _paged(rows: list[tuple[int, int]], **indptr: torch.Tensor) -> Answer:
    """For each row its sequence and how many keys it sees.

    Head h scores each key SM_SCALE * (h + 2 h), of ckv and of kpe, whose first components are 1. So weights are
    uniform: the output is 1, then the mean of the values seen, and lse = log2(keys) + SM_SCALE * 3 h * log2(e).
    """
    ckv = torch.full((4, PAGE_SIZE, CKV), math.nan, dtype=torch.bfloat16)
    kpe = torch.full((4, PAGE_SIZE, KPE), math.nan, dtype=torch.bfloat16)
    for sequence, (pages, keys) in enumerate(zip(PAGES, KEYS, strict=True)):
        for position in range(keys):
            slot = pages[position // PAGE_SIZE], position % PAGE_SIZE
            ckv[slot] = _value(sequence, position)
            ckv[slot][0] = 1
            kpe[slot] = torch.eye(1, KPE)
    q_nope, q_pe = (torch.zeros(len(rows), HEADS, width, dtype=torch.bfloat16) for width in (CKV, KPE))
    q_nope[:, :, 0], q_pe[:, :, 0] = torch.arange(HEADS), 2 * torch.arange(HEADS)
    output = torch.ones(len(rows), HEADS, CKV)
    for row, (sequence, keys) in enumerate(rows):
        output[row, :, 1:] = sum(_value(sequence, j) for j in range(keys)) / keys
    table = {
        "kv_indptr": torch.tensor([0, 2, 3], dtype=torch.int32),
        "kv_indices": torch.tensor([page for pages in PAGES for page in pages], dtype=torch.int32),
        "kv_last_page_len": torch.tensor([2, 3], dtype=torch.int32),
    }
    given = {"q_nope": q_nope, "q_pe": q_pe, "ckv_cache": ckv, "kpe_cache": kpe, **indptr, **table}
    lse = torch.tensor([[_log(keys, 3 * h) for h in range(HEADS)] for _, keys in rows])
    return {**given, "sm_scale": SM_SCALE}, {"output": output.to(torch.bfloat16), "lse": lse}


def _mla_paged_decode() -> Answer:
    return _paged([(0, 66), (1, 3)])


def _mla_paged_prefill_causal() -> Answer:
    """Three queries at the end of the first sequence, one at the end of the second."""
    return _paged([(0, 64), (0, 65), (0, 66), (1, 3)], qo_indptr=torch.tensor([0, 3, 4], dtype=torch.int32))


def _mla_ragged_prefill_causal() -> Answer:
    """Sequences of 6 and 3 keys, three queries and one; head h scores each key SM_SCALE * (h + 2 h).

    Of the first component and of the last, which are 1 in every key, the last beyond the width of a value. Head h
    outputs the mean of the values that the row sees, plus h.
    """
    keys, rows = ((0, 6), (1, 3)), ((0, 4), (0, 5), (0, 6), (1, 3))
    q = torch.zeros(len(rows), HEADS, QK)
    q[:, :, 0], q[:, :, -1] = torch.arange(HEADS), 2 * torch.arange(HEADS)
    k = torch.zeros(9, HEADS, QK)
    k[:, :, [0, -1]] = 1
    v = torch.tensor([[_value(s, j) + h for h in range(HEADS)] for s, n in keys for j in range(n)])
    mean = torch.tensor([[sum(_value(s, j) for j in range(n)) / n + h for h in range(HEADS)] for s, n in rows])
    lse = torch.tensor([[_log(n, 3 * h) for h in range(HEADS)] for _, n in rows])
    given = {
        "q": q.to(torch.bfloat16),
        "k": k.to(torch.bfloat16),
        "v": v[:, :, None].repeat(1, 1, VO).to(torch.bfloat16),
        "qo_indptr": torch.tensor([0, 3, 4], dtype=torch.int32),
        "kv_indptr": torch.tensor([0, 6, 9], dtype=torch.int32),
        "sm_scale": SM_SCALE,
    }
    return given, {"output": mean[:, :, None].repeat(1, 1, VO).to(torch.bfloat16), "lse": lse}


CASES: dict[str, Callable[[], Answer]] = {
    "mla_paged_decode": _mla_paged_decode,
    "mla_paged_prefill_causal": _mla_paged_prefill_causal,
    "mla_ragged_prefill_causal": _mla_ragged_prefill_causal,
}

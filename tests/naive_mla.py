"""Latent and ragged attention one query, one head and one key at a time, straight from the definitions' words.

`paged` and `ragged` also draw inputs: every slot that no sequence uses holds NaN, and pages are shuffled.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def attention(
    q: Tensor, keys: list[Tensor], values: list[Tensor], qo_len: list[int], sm_scale: float
) -> tuple[Tensor, Tensor]:
    """q [total_q, heads, d_qk]; keys, values of each sequence [kv_len, kv heads, d] -> output and base-2 lse."""
    output = q.new_zeros(*q.shape[:2], values[0].shape[-1] if values else 0)
    lse = q.new_full(q.shape[:2], -math.inf)
    row = 0
    for sequence, queries in enumerate(qo_len):
        k, v = keys[sequence], values[sequence]
        for i in range(queries):
            seen = max(0, len(k) - queries + i + 1)
            for head in range(q.shape[1] if seen else 0):
                kv_head = head * k.shape[1] // q.shape[1]
                scores = [float(q[row, head] @ k[j, kv_head]) * sm_scale for j in range(seen)]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights)
                output[row, head] = sum(w / total * v[j, kv_head] for j, w in enumerate(weights))
                lse[row, head] = (top + math.log(total)) / math.log(2)
            row += 1
    return output, lse


def mla_paged(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_len: Tensor | None = None,
    qo_indptr: Tensor | None = None,
    *,
    sm_scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """mla_paged_prefill_causal, and mla_paged_decode without qo_indptr: one query a sequence."""
    keys, values, page_size = [], [], ckv_cache.shape[1]
    for sequence, (start, end) in enumerate(pairwise(kv_indptr.tolist())):
        count = (end - start) * page_size
        if kv_last_page_len is not None and count:
            count += int(kv_last_page_len[sequence]) - page_size
        key, value = [], []
        for j in range(count):
            slot = int(kv_indices[start + j // page_size]), j % page_size
            key.append(torch.cat([ckv_cache[slot], kpe_cache[slot]]).to(dtype))
            value.append(ckv_cache[slot].to(dtype))
        width = ckv_cache.shape[2] + kpe_cache.shape[2]
        keys.append(torch.stack(key)[:, None] if key else torch.zeros(0, 1, width, dtype=dtype))
        values.append(torch.stack(value)[:, None] if value else torch.zeros(0, 1, ckv_cache.shape[2], dtype=dtype))
    queries = [1] * len(q_nope) if qo_indptr is None else qo_indptr.diff().tolist()
    return attention(torch.cat([q_nope, q_pe], -1).to(dtype), keys, values, queries, sm_scale)


def ragged_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    *,
    sm_scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """gqa_ragged_prefill_causal and mla_ragged_prefill_causal."""
    parts = list(pairwise(kv_indptr.tolist()))
    keys, values = ([x[start:end].to(dtype) for start, end in parts] for x in (k, v))
    return attention(q.to(dtype), keys, values, qo_indptr.diff().tolist(), sm_scale)


def cumulated(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def draw_paged(
    qo_len: list[int],
    kv_len: list[int],
    page_size: int = 1,
    *,
    heads: int = 4,
    widths: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.bfloat16,
    spare: int = 3,
    seed: int = 0,
) -> Inputs:
    """Inputs of mla_paged_prefill_causal; those of decode are all but qo_indptr. No kv_last_page_len at page_size 1."""
    torch.manual_seed(seed)
    pages = [-(-keys // page_size) for keys in kv_len]
    indptr, indices = cumulated(pages), torch.randperm(sum(pages) + spare)[: sum(pages)]
    caches = [torch.full((sum(pages) + spare, page_size, width), math.nan, dtype=dtype) for width in widths]
    for sequence, keys in enumerate(kv_len):
        for j in range(keys):
            slot = int(indices[indptr[sequence] + j // page_size]), j % page_size
            for cache in caches:
                cache[slot] = torch.randn(cache.shape[2]).to(dtype)
    last = [keys - (count - 1) * page_size if count else 0 for keys, count in zip(kv_len, pages, strict=True)]
    inputs = {
        "q_nope": torch.randn(sum(qo_len), heads, widths[0]).to(dtype),
        "q_pe": torch.randn(sum(qo_len), heads, widths[1]).to(dtype),
        "ckv_cache": caches[0],
        "kpe_cache": caches[1],
        "qo_indptr": cumulated(qo_len),
        "kv_indptr": indptr,
        "kv_indices": indices.int(),
        "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
    }
    return {name: value for name, value in inputs.items() if page_size > 1 or name != "kv_last_page_len"}


def draw_ragged(
    qo_len: list[int],
    kv_len: list[int],
    *,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Inputs of a ragged prefill: heads of queries and of keys, widths of keys and of values."""
    torch.manual_seed(seed)
    return {
        "q": torch.randn(sum(qo_len), heads[0], widths[0]).to(dtype),
        "k": torch.randn(sum(kv_len), heads[1], widths[0]).to(dtype),
        "v": torch.randn(sum(kv_len), heads[1], widths[1]).to(dtype),
        "qo_indptr": cumulated(qo_len),
        "kv_indptr": cumulated(kv_len),
    }

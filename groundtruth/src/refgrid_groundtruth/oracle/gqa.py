"""Grouped-query attention in float64, sequence by sequence."""

from __future__ import annotations

import torch

from refgrid_groundtruth.oracle import attention


def gqa_paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """One query a sequence, which sees every key; as gqa_paged_prefill_causal with batch_size for total_q."""
    qo_indptr = torch.arange(len(q) + 1)
    return gqa_paged_prefill_causal(
        q, k_cache, v_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, sm_scale=sm_scale
    )


def gqa_paged_prefill_causal(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """The pages of one sequence side by side, cut where its last page ends.

    q [total_q, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; qo_indptr,
    kv_indptr [len_indptr]; kv_indices [num_kv_indices]; kv_last_page_len [len_indptr - 1]
    -> output as q; lse [total_q, num_qo_heads] float32, base 2.
    """
    bounds, page_size = kv_indptr.tolist(), k_cache.shape[1]
    filled = None if kv_last_page_len is None else kv_last_page_len.tolist()

    def keys(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = kv_indices[bounds[sequence] : bounds[sequence + 1]].long()
        count = len(pages) * page_size - (page_size - filled[sequence] if filled and len(pages) else 0)
        k, v = (cache[pages].flatten(0, 1)[:count] for cache in (k_cache, v_cache))
        return k, v

    return attention.causal(q, keys, qo_indptr, v_cache.shape[3], sm_scale)


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr].

    -> output as q; lse [total_q, num_qo_heads] float32, base 2.
    """
    return attention.ragged(q, k, v, qo_indptr, kv_indptr, sm_scale)

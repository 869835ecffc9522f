"""Grouped-query attention: the layouts of queries, keys and values that serving engines use."""

import torch

from refgrid_references.attention import attend, attend_ragged, paged_lengths


def gqa_paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention of one new token a sequence, as flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper.

    q [batch_size, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; kv_indptr
    [batch_size + 1]; kv_indices [num_kv_indices]; kv_last_page_len [batch_size], full pages without it
    -> output as q; lse [batch_size, num_qo_heads] float32, base 2. A sequence without keys gives 0 and -inf.
    """
    kv_len = paged_lengths(kv_indptr, kv_last_page_len, k_cache.shape[1])
    qo_indptr = torch.arange(q.shape[0] + 1, device=q.device)  # one query each: causal, it sees every key
    return attend([q], [k_cache], v_cache, qo_indptr, kv_indptr, kv_indices, kv_len, sm_scale)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention of new tokens, as flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper.

    q [total_q, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; qo_indptr,
    kv_indptr [len_indptr]; kv_indices [num_kv_indices]; kv_last_page_len [len_indptr - 1], full pages without it
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. Query i of a sequence sees keys
    j <= kv_len - qo_len + i; one that sees no key gives 0 and -inf.
    """
    kv_len = paged_lengths(kv_indptr, kv_last_page_len, k_cache.shape[1])
    return attend([q], [k_cache], v_cache, qo_indptr, kv_indptr, kv_indices, kv_len, sm_scale)


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal grouped-query attention without pages, as flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper.

    q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr]
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. Query i of a sequence sees keys
    j <= kv_len - qo_len + i; one that sees no key gives 0 and -inf.
    """
    return attend_ragged(q, k, v, qo_indptr, kv_indptr, sm_scale)

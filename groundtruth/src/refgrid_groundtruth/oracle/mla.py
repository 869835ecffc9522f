"""Latent attention in float64, sequence by sequence: absorbed over pages, expanded in a row."""

from __future__ import annotations

import torch

from refgrid_groundtruth.oracle import attention


def mla_paged_decode(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """One query a sequence, which sees every key; as mla_paged_prefill_causal with batch_size for total_q."""
    qo_indptr = torch.arange(len(q_nope) + 1)
    return mla_paged_prefill_causal(
        q_nope, q_pe, ckv_cache, kpe_cache, qo_indptr, kv_indptr, kv_indices, kv_last_page_len, sm_scale=sm_scale
    )


def mla_paged_prefill_causal(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """The pages of one sequence side by side, cut where its last page ends; its key is ckv, then kpe, its value ckv.

    q_nope [total_q, num_qo_heads, head_dim_ckv]; q_pe [total_q, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages,
    page_size, head_dim_ckv], kpe_cache likewise; qo_indptr, kv_indptr [len_indptr]; kv_indices [num_kv_indices];
    kv_last_page_len [len_indptr - 1] -> output as q_nope; lse [total_q, num_qo_heads] float32, base 2.
    """
    bounds, page_size = kv_indptr.tolist(), ckv_cache.shape[1]
    filled = None if kv_last_page_len is None else kv_last_page_len.tolist()

    def keys(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = kv_indices[bounds[sequence] : bounds[sequence + 1]].long()
        unused = page_size - filled[sequence] if filled and len(pages) else 0
        count = len(pages) * page_size - unused
        ckv, kpe = (cache[pages].flatten(0, 1)[:count, None] for cache in (ckv_cache, kpe_cache))
        return torch.cat([ckv, kpe], dim=2), ckv

    return attention.causal(torch.cat([q_nope, q_pe], dim=2), keys, qo_indptr, q_nope.shape[2], sm_scale)


def mla_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """q [total_q, num_qo_heads, qk_dim]; k [total_kv, num_kv_heads, qk_dim]; v [total_kv, num_kv_heads, vo_dim].

    qo_indptr, kv_indptr [len_indptr] -> output [total_q, num_qo_heads, vo_dim]; lse [total_q, num_qo_heads] float32,
    base 2.
    """
    return attention.ragged(q, k, v, qo_indptr, kv_indptr, sm_scale)

"""Latent attention by llama's eager_attention_forward, whose keys may be wider than its values; see gqa.py."""

from __future__ import annotations

import torch

from refgrid_groundtruth.paged import kv_lengths, latent, used_slots
from refgrid_groundtruth.transformers.gqa import attend


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
    """One query a sequence: the causal prefill of one row, which sees every key of its sequence.

    q_nope [batch_size, num_qo_heads, head_dim_ckv]; the rest as in mla_paged_prefill_causal -> output as q_nope.
    """
    qo_indptr = torch.arange(len(q_nope) + 1, dtype=torch.int32, device=q_nope.device)
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
    """The used slots of both caches become one key head, then go through llama's eager_attention_forward.

    q_nope [total_q, num_qo_heads, head_dim_ckv]; q_pe [total_q, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages,
    page_size, head_dim_ckv], kpe_cache likewise with head_dim_kpe; qo_indptr, kv_indptr [len_indptr], kv_indices
    [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32
    -> output as q_nope; eager attention gives no lse. Raises Unavailable("unsupported") where a row sees no key.
    """
    page_size = ckv_cache.shape[1]
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, page_size)
    k, v = latent(ckv_cache, kpe_cache, used_slots(kv_indptr, kv_indices, kv_len, page_size))
    return attend(torch.cat([q_nope, q_pe], dim=-1), k, v, qo_indptr, kv_len, sm_scale)


def mla_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Keys that lie in a row already, through llama's eager_attention_forward.

    q [total_q, num_qo_heads, qk_dim]; k [total_kv, num_kv_heads, qk_dim]; v [total_kv, num_kv_heads, vo_dim];
    qo_indptr, kv_indptr [len_indptr] int32
    -> output [total_q, num_qo_heads, vo_dim]. Raises Unavailable("unsupported") where a row sees no key.
    """
    return attend(q, k, v, qo_indptr, kv_indptr.diff().long(), sm_scale)

"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434), absorbed and as it is trained."""

import torch

from refgrid_references.attention import attend, attend_ragged, paged_lengths


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed latent attention of one new token a sequence, as flashinfer.mla.BatchMLAPagedAttentionWrapper.

    Score = sm_scale (q_nope ckv + q_pe kpe), value = ckv: one key for all heads. q_nope [batch_size, num_qo_heads,
    head_dim_ckv]; q_pe [batch_size, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages, page_size, head_dim_ckv];
    kpe_cache [num_pages, page_size, head_dim_kpe]; kv_indptr [batch_size + 1]; kv_indices [num_kv_indices];
    kv_last_page_len [batch_size], full pages without it
    -> output as q_nope; lse [batch_size, num_qo_heads] float32, base 2. A sequence without keys gives 0 and -inf.
    """
    qo_indptr = torch.arange(q_nope.shape[0] + 1, device=q_nope.device)  # one query each: causal, it sees every key
    kv_len = paged_lengths(kv_indptr, kv_last_page_len, ckv_cache.shape[1])
    ckv, kpe = ckv_cache[:, :, None], kpe_cache[:, :, None]  # one kv head
    return attend([q_nope, q_pe], [ckv, kpe], ckv, qo_indptr, kv_indptr, kv_indices, kv_len, sm_scale)


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal absorbed latent attention of new tokens, as flashinfer.mla.BatchMLAPagedAttentionWrapper.

    Score = sm_scale (q_nope ckv + q_pe kpe), value = ckv: one key for all heads. q_nope [total_q, num_qo_heads,
    head_dim_ckv]; q_pe [total_q, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages, page_size, head_dim_ckv];
    kpe_cache [num_pages, page_size, head_dim_kpe]; qo_indptr, kv_indptr [len_indptr]; kv_indices [num_kv_indices];
    kv_last_page_len [len_indptr - 1], full pages without it
    -> output as q_nope; lse [total_q, num_qo_heads] float32, base 2. Query i of a sequence sees keys
    j <= kv_len - qo_len + i; one that sees no key gives 0 and -inf.
    """
    kv_len = paged_lengths(kv_indptr, kv_last_page_len, ckv_cache.shape[1])
    ckv, kpe = ckv_cache[:, :, None], kpe_cache[:, :, None]  # one kv head
    return attend([q_nope, q_pe], [ckv, kpe], ckv, qo_indptr, kv_indptr, kv_indices, kv_len, sm_scale)


def mla_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal latent attention with keys and values expanded per head, before absorption; the rotary part is in q and k.

    As flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper: q [total_q, num_qo_heads, qk_dim]; k [total_kv,
    num_kv_heads, qk_dim]; v [total_kv, num_kv_heads, vo_dim]; qo_indptr, kv_indptr [len_indptr]
    -> output [total_q, num_qo_heads, vo_dim] in q's dtype; lse [total_q, num_qo_heads] float32, base 2. Query i of a
    sequence sees keys j <= kv_len - qo_len + i; one that sees no key gives 0 and -inf.
    """
    return attend_ragged(q, k, v, qo_indptr, kv_indptr, sm_scale)

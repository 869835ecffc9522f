"""Latent attention by FlashInfer: absorbed by the MLA wrapper, expanded by the ragged prefill wrapper.

The MLA wrapper's lse is base 2 unless asked otherwise (read in 0.5.3, 0.6.7.post3, 0.6.12 and 0.7.2.post1).
"""

from __future__ import annotations

import flashinfer.mla
import torch

from refgrid_groundtruth.flashinfer import gqa
from refgrid_groundtruth.paged import kv_lengths, sees_no_key


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
    backend: str = "fa2",
) -> dict[str, torch.Tensor]:
    """One query a sequence, which sees every key of it: no mask.

    q_nope [batch_size, num_qo_heads, head_dim_ckv]; the rest as in mla_paged_prefill_causal
    -> output as q_nope; lse [batch_size, num_qo_heads] float32, base 2.
    """
    qo_indptr = torch.arange(len(q_nope) + 1, dtype=torch.int32, device=q_nope.device)
    caches = (ckv_cache, kpe_cache)
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, ckv_cache.shape[1])
    table = (qo_indptr, kv_indptr, kv_indices, kv_len)
    return _attend((q_nope, q_pe), caches, table, causal=False, sm_scale=sm_scale, backend=backend)


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
    backend: str = "fa2",
) -> dict[str, torch.Tensor]:
    """flashinfer.mla.BatchMLAPagedAttentionWrapper, causal (right-aligned), on its fa2 or fa3 backend.

    q_nope [total_q, num_qo_heads, head_dim_ckv]; q_pe [total_q, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages,
    page_size, head_dim_ckv], kpe_cache likewise with head_dim_kpe; qo_indptr, kv_indptr [len_indptr], kv_indices
    [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32
    -> output as q_nope; lse [total_q, num_qo_heads] float32, base 2.
    """
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, ckv_cache.shape[1])
    table = (qo_indptr, kv_indptr, kv_indices, kv_len)
    return _attend((q_nope, q_pe), (ckv_cache, kpe_cache), table, causal=True, sm_scale=sm_scale, backend=backend)


def mla_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
    backend: str = "fa2",
) -> dict[str, torch.Tensor]:
    """flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper with keys wider than values; see gqa.py.

    q [total_q, num_qo_heads, qk_dim]; k [total_kv, num_kv_heads, qk_dim]; v [total_kv, num_kv_heads, vo_dim];
    qo_indptr, kv_indptr [len_indptr] int32
    -> output [total_q, num_qo_heads, vo_dim]; lse [total_q, num_qo_heads] float32, base 2.
    """
    return gqa.gqa_ragged_prefill_causal(q, k, v, qo_indptr, kv_indptr, sm_scale=sm_scale, backend=backend)


def _attend(
    q: tuple[torch.Tensor, torch.Tensor],
    caches: tuple[torch.Tensor, torch.Tensor],
    table: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    causal: bool,
    sm_scale: float,
    backend: str,
) -> dict[str, torch.Tensor]:
    """q is (q_nope, q_pe), caches (ckv, kpe), table (qo_indptr, kv_indptr, kv_indices, kv_len).

    0.7 wants its plan by keyword. Up to 0.6.7 the lse of a row without keys is the kernels' stand-in, later -inf.
    """
    qo_indptr, kv_indptr, kv_indices, kv_len = table
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(gqa.workspace(q[0].device), backend=backend)
    wrapper.plan(
        qo_indptr=qo_indptr,
        kv_indptr=kv_indptr,
        kv_indices=kv_indices,
        kv_len_arr=kv_len.int(),
        num_heads=q[0].shape[1],
        head_dim_ckv=q[0].shape[2],
        head_dim_kpe=q[1].shape[2],
        page_size=caches[0].shape[1],
        causal=causal,
        sm_scale=sm_scale,
        q_data_type=q[0].dtype,
        kv_data_type=caches[0].dtype,
    )
    output, lse = wrapper.run(*q, *caches, return_lse=True)
    return {"output": output, "lse": gqa.with_infinity(lse, sees_no_key(qo_indptr, kv_len))}

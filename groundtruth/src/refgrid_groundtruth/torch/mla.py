"""Latent attention by scaled_dot_product_attention on its math path, whose keys may be wider than its values.

The operators that give a log-sum-exp want one width for both, so there is none here. In torch 2.13 the math path
computes a bfloat16 in float32 and gives 0 for a row that is masked out whole.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from refgrid_groundtruth.paged import kv_lengths, latent, tiles, used_slots


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
    """The used slots of both caches become one key head, then are attended to on the math path.

    q_nope [total_q, num_qo_heads, head_dim_ckv]; q_pe [total_q, num_qo_heads, head_dim_kpe]; ckv_cache [num_pages,
    page_size, head_dim_ckv], kpe_cache likewise with head_dim_kpe; qo_indptr, kv_indptr [len_indptr], kv_indices
    [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32 -> output as q_nope.
    """
    page_size = ckv_cache.shape[1]
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, page_size)
    k, v = latent(ckv_cache, kpe_cache, used_slots(kv_indptr, kv_indices, kv_len, page_size))
    return _attend(torch.cat([q_nope, q_pe], dim=-1), k, v, qo_indptr, kv_len, sm_scale)


def mla_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Keys that lie in a row already, attended to on the math path.

    q [total_q, num_qo_heads, qk_dim]; k [total_kv, num_kv_heads, qk_dim]; v [total_kv, num_kv_heads, vo_dim];
    qo_indptr, kv_indptr [len_indptr] int32 -> output [total_q, num_qo_heads, vo_dim].
    """
    return _attend(q, k, v, qo_indptr, kv_indptr.diff().long(), sm_scale)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """k [sum of kv_len, num_qo_heads or 1, d_qk], sequence after sequence; v likewise with d_vo."""
    output = q.new_empty(*q.shape[:2], v.shape[2])
    for tile in tiles(q, k, v, qo_indptr, kv_len):
        query, key, value = (each.transpose(0, 1)[None] for each in (tile.q, tile.k, tile.v))
        heads = (-1, q.shape[1], -1, -1)
        with sdpa_kernel(SDPBackend.MATH):
            out = functional.scaled_dot_product_attention(
                query, key.expand(heads), value.expand(heads), attn_mask=tile.mask, scale=sm_scale
            )
        output[tile.rows] = out[0].transpose(0, 1)
    return {"output": output}

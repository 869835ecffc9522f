"""Attention by the Triton kernels of SGLang's own attention backend; read in 0.5.15.

They take one token a page, so pages become slots. Both divide by a sum of weights that is 0 for a row without keys.
"""

from __future__ import annotations

import math

import torch
from sglang.srt.layers.attention.triton_ops.decode_attention import decode_attention_fwd
from sglang.srt.layers.attention.triton_ops.extend_attention import extend_attention_fwd

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.paged import kv_lengths, sees_no_key, used_slots

SPLITS = 1  # parts of a sequence that decode merges; more than one would leave the lse in parts


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
    """decode_attention_fwd: grouped heads, or one query head a key head, over the slots of the cache.

    q [batch_size, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; kv_indptr
    [batch_size + 1], kv_indices [num_kv_indices], kv_last_page_len [batch_size], all int32
    -> output as q; lse [batch_size, num_qo_heads] float32, base 2. Raises Unavailable("unsupported") where a sequence
    has no key.
    """
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, k_cache.shape[1])
    _demand_keys(torch.arange(len(q) + 1, device=q.device), kv_len)
    output, lse = torch.empty_like(q), q.new_empty(*q.shape[:2], SPLITS, dtype=torch.float32)
    decode_attention_fwd(
        *(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), output),
        kv_indptr=_starts(kv_len),
        kv_indices=used_slots(kv_indptr, kv_indices, kv_len, k_cache.shape[1]),
        attn_logits=q.new_empty(*lse.shape, q.shape[2], dtype=torch.float32),
        attn_lse=lse,
        num_kv_splits=torch.full_like(kv_indptr[1:], SPLITS),
        max_kv_splits=SPLITS,
        sm_scale=sm_scale,
        k_scale=1.0,
        v_scale=1.0,
    )
    return {"output": output, "lse": lse[:, :, 0] * math.log2(math.e)}


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
    """extend_attention_fwd; q and caches as in gqa_paged_decode, but for total_q rows of q; qo_indptr [len_indptr].

    -> output as q; lse [total_q, num_qo_heads] float32, base 2. Raises Unavailable("unsupported") where a row sees no
    key.
    """
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, k_cache.shape[1])
    slots = used_slots(kv_indptr, kv_indices, kv_len, k_cache.shape[1])
    return _extend(q, k_cache.flatten(0, 1), v_cache.flatten(0, 1), slots, qo_indptr, kv_len, sm_scale)


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """extend_attention_fwd; k and v are a cache in which every key lies in its place.

    q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr]
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. Raises Unavailable("unsupported") where a row sees no
    key.
    """
    slots = torch.arange(len(k), device=k.device)
    return _extend(q, k, v, slots, qo_indptr, kv_indptr.diff().long(), sm_scale)


def _extend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """The kernel wants the keys of the new tokens in a row, those of the tokens before where they lie in the cache.

    k, v [slots, num_kv_heads, head_dim]; slots [sum of kv_len], where each key lies, sequence after sequence.
    """
    _demand_keys(qo_indptr, kv_len)
    before = kv_len - qo_indptr.diff()
    sequence = torch.arange(len(kv_len), device=q.device).repeat_interleave(kv_len)
    position = torch.arange(len(sequence), device=q.device) - (kv_len.cumsum(0) - kv_len)[sequence]
    cached = position < before[sequence]
    output, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    extend_attention_fwd(
        *(q, k[slots[~cached]], v[slots[~cached]], output, k, v),
        qo_indptr=qo_indptr,
        kv_indptr=_starts(before),
        kv_indices=slots[cached],
        custom_mask=None,
        is_causal=True,
        mask_indptr=None,
        max_len_extend=int(qo_indptr.diff().max()),
        k_scale=1.0,
        v_scale=1.0,
        sm_scale=sm_scale,
        lse_extend=lse,
    )
    return {"output": output, "lse": lse * math.log2(math.e)}


def _starts(lengths: torch.Tensor) -> torch.Tensor:
    """Row starts of these lengths, int32."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()


def _demand_keys(qo_indptr: torch.Tensor, kv_len: torch.Tensor) -> None:
    rows = int(sees_no_key(qo_indptr, kv_len).sum())
    if rows:
        raise Unavailable("unsupported", f"{rows} rows see no key, for which the kernel divides 0 by 0")

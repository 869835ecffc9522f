"""Attention by the operators below `scaled_dot_product_attention`, which give the log-sum-exp too.

On a CPU `aten::_scaled_dot_product_flash_attention_for_cpu`, on CUDA `aten::_flash_attention_forward`
(FlashAttention-2). Run with torch 2.13 on a CPU and 2.11 on CUDA.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid_groundtruth.paged import Tile, kv_lengths, sees_no_key, tiles, used_slots

if TYPE_CHECKING:
    from collections.abc import Iterable


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
    """One query a sequence: the causal prefill of one row, which sees every key of its sequence.

    q [batch_size, num_qo_heads, head_dim]; the rest as in gqa_paged_prefill_causal
    -> output as q, lse [batch_size, num_qo_heads] float32, base 2.
    """
    qo_indptr = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
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
    """Keys are gathered through the page table (used slots only), then attended to by the operator of the device.

    q [total_q, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; qo_indptr,
    kv_indptr [len_indptr], kv_indices [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. CUDA's FlashAttention takes float16 and bfloat16 only.
    """
    page_size = k_cache.shape[1]
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, page_size)
    slots = used_slots(kv_indptr, kv_indices, kv_len, page_size)
    k, v = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]
    return _attend(q, k, v, qo_indptr, kv_len, sm_scale)


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """The operator of the device on keys that lie in a row already.

    q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr]
    -> output as q; lse [total_q, num_qo_heads] float32, base 2.
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
    """k, v [sum of kv_len, num_kv_heads, head_dim], sequence after sequence."""
    attend = attend_on_cuda if q.is_cuda else _attend_on_cpu
    output, lse, marker = attend(q, k, v, qo_indptr, kv_len, sm_scale)
    # Neither operator writes -inf for a row that sees no key; each has a marker, translated in those rows alone.
    no_key = (sees_no_key(qo_indptr, kv_len)[:, None]) & (lse == marker)
    return {"output": output, "lse": torch.where(no_key, -math.inf, lse * math.log2(math.e))}


def _attend_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """-> output, lse in base e, and 0, which the operator writes for the lse of a fully masked row; its output is 0."""
    return *attend_tiles(q, tiles(q, k, v, qo_indptr, kv_len), sm_scale), 0.0


def attend_tiles(q: torch.Tensor, pieces: Iterable[Tile], sm_scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """-> output as q and lse in base e on a CPU, written in the tiles' rows only; 0 and 0 for a row fully masked.

    The operator's is_causal is left-aligned, so the right-aligned mask is added. Heads are laid out as [num_kv_heads,
    group], the keys repeated by a stride of 0.
    """
    output, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
    for tile in pieces:
        grouped = tile.q.reshape(len(tile.q), tile.k.shape[1], -1, q.shape[2]).permute(1, 2, 0, 3)
        keys, values, mask = _with_a_key(tile.k, tile.v, tile.mask)
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - no public one gives lse
            grouped,
            keys.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1),
            values.transpose(0, 1)[:, None].expand(-1, grouped.shape[1], -1, -1),
            attn_mask=mask,
            scale=sm_scale,
        )
        output[tile.rows] = out.permute(2, 0, 1, 3).flatten(1, 2)
        lse[tile.rows] = log_sum.permute(2, 0, 1).flatten(1, 2)
    return output, lse


def _with_a_key(
    k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Without any key the operator divides by zero and ends the process: pass one padded key, masked out."""
    if len(k):
        return k, v, mask
    return (
        k.new_zeros(1, *k.shape[1:]),
        v.new_zeros(1, *v.shape[1:]),
        mask.new_full((len(mask), 1), -math.inf),
    )


def attend_on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """-> output, lse in base e, and +inf, which FlashAttention-2 writes for the lse of a row that sees no key.

    One call for all sequences. A max_q of 1 would make the operator take every sequence for one of exactly one query,
    so it is told at least 2: an upper bound.
    """
    cum_k = torch.nn.functional.pad(kv_len.cumsum(0), (1, 0)).int()
    max_q, max_k = max(2, int(qo_indptr.diff().max())), int(kv_len.max())
    result = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - no public one gives lse
        q, k, v, qo_indptr, cum_k, max_q, max_k, 0.0, causal, False, scale=sm_scale
    )
    return result[0], result[1].transpose(0, 1).contiguous(), math.inf

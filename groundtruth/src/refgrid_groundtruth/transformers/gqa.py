"""Attention by llama's eager_attention_forward, run with transformers 5.23.0, also read in 5.12.0 and 5.17.0.

It rounds its scores and its weights to the dtype, so in bfloat16 it is a coarser truth than the fused kernels;
the table of tolerances holds by how much.
"""

from __future__ import annotations

import torch
from transformers.models.llama import modeling_llama

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.paged import Tile, kv_lengths, tiles, used_slots


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

    q [batch_size, num_qo_heads, head_dim]; the rest as in gqa_paged_prefill_causal -> output as q.
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
    """Keys are gathered through the page table (used slots only), then go through llama's eager_attention_forward.

    q [total_q, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; qo_indptr,
    kv_indptr [len_indptr], kv_indices [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32
    -> output as q; eager attention gives no lse. Raises Unavailable("unsupported") where a row sees no key, for which
    a softmax over nothing defines no result.
    """
    page_size = k_cache.shape[1]
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, page_size)
    slots = used_slots(kv_indptr, kv_indices, kv_len, page_size)
    return attend(q, k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots], qo_indptr, kv_len, sm_scale)


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Keys that lie in a row already, through llama's eager_attention_forward.

    q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr]
    -> output as q. Raises Unavailable("unsupported") where a row sees no key.
    """
    return attend(q, k, v, qo_indptr, kv_indptr.diff().long(), sm_scale)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """Eager attention, some queries of one sequence at a time; values may be narrower than keys.

    q [total_q, num_qo_heads, d_qk]; k [sum of kv_len, num_kv_heads, d_qk], sequence after sequence; v likewise with
    d_vo -> output [total_q, num_qo_heads, d_vo]. Raises Unavailable("unsupported") where a row sees no key.
    """
    _demand_keys(qo_indptr, kv_len)
    layer = Layer(q.shape[1] // k.shape[1])
    output = q.new_empty(*q.shape[:2], v.shape[2])
    for tile in tiles(q, k, v, qo_indptr, kv_len):
        output[tile.rows] = eager_attention(layer, tile, sm_scale)
    return {"output": output}


def eager_attention(layer: Layer, tile: Tile, sm_scale: float) -> torch.Tensor:
    """The output of a tile's rows, [rows, num_qo_heads, d_vo]."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (tile.q, tile.k, tile.v))
    out, _ = modeling_llama.eager_attention_forward(layer, query, key, value, tile.mask, scaling=sm_scale)
    return out[0]


class Layer(torch.nn.Module):
    """What eager attention asks of the layer that it serves."""

    def __init__(self, num_key_value_groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = num_key_value_groups
        self.eval()


def _demand_keys(qo_indptr: torch.Tensor, kv_len: torch.Tensor) -> None:
    lengths = zip(qo_indptr.diff().tolist(), kv_len.tolist(), strict=True)
    for sequence, (queries, keys) in enumerate(lengths):
        if queries > keys:
            reason = f"sequence {sequence} has {queries} queries but {keys} keys: eager attention defines nothing"
            raise Unavailable("unsupported", f"{reason} for a row that sees no key")

"""Rotary embeddings by flashinfer.rope; read in 0.5.3, 0.6.7.post3, 0.6.12 and 0.7.2.post1."""

from __future__ import annotations

import torch
from flashinfer.rope import apply_rope_with_cos_sin_cache


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """apply_rope_with_cos_sin_cache, which leaves q and k as they are, on heads side by side.

    q [num_tokens, num_qo_heads, head_size]; k [num_tokens, num_kv_heads, head_size]; cos_sin_cache [max_seq_len,
    rotary_dim] float32; positions [num_tokens] -> q_out as q, k_out as k.
    """
    q_out, k_out = apply_rope_with_cos_sin_cache(
        positions, q.flatten(1), k.flatten(1), q.shape[2], cos_sin_cache, is_neox=True
    )
    return {"q_out": q_out.view_as(q), "k_out": k_out.view_as(k)}

"""Rotary embeddings by MiniMax-M2's apply_rotary_pos_emb; run with transformers 5.23.0, also read in 5.12.1."""

from __future__ import annotations

import torch
from transformers.models.minimax_m2 import modeling_minimax_m2


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """q [num_tokens, num_qo_heads, head_size], k likewise; cos_sin_cache [max_seq_len, rotary_dim] -> q_out, k_out.

    The function wants each cosine twice, for both halves, and gives what its operands promote to: float32 with this
    table, rounded here to the dtype of q and k. The model itself rounds the table to that dtype before.
    """
    cos, sin = (part.repeat(1, 2) for part in cos_sin_cache[positions].chunk(2, dim=1))
    q_out, k_out = modeling_minimax_m2.apply_rotary_pos_emb(q, k, cos, sin)
    return {"q_out": q_out.to(q.dtype), "k_out": k_out.to(k.dtype)}

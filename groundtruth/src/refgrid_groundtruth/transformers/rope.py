"""Rotary embeddings by GPT-NeoX's apply_rotary_pos_emb, which leaves what is beyond the rotated part; 5.12 to 5.23.

It turns the numbers in the dtype of its inputs. So it gets float32 ones, which is exact, and its result is cast.
"""

from __future__ import annotations

import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """q [num_tokens, num_qo_heads, head_size], k likewise -> q_out, k_out; tokens are its batch of one sequence each."""
    cos, sin = (part.repeat(1, 2)[:, None] for part in cos_sin_cache[positions].chunk(2, dim=1))
    heads = (x.float()[:, :, None] for x in (q, k))  # [batch, heads, 1, head_size]
    q_out, k_out = apply_rotary_pos_emb(*heads, cos, sin)
    return {"q_out": q_out[:, :, 0].to(q.dtype), "k_out": k_out[:, :, 0].to(k.dtype)}

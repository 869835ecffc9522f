"""Rotary embeddings by the CUDA kernel that SGLang compiles at the first call; read in 0.5.15.

sgl_kernel.rotary_embedding takes a table of the dtype of q and k only, which would be rounded from the definition's.
"""

from __future__ import annotations

import torch
from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> dict[str, torch.Tensor]:
    """apply_rope_with_cos_sin_cache_inplace on the rotary part of copies, as SGLang's RotaryEmbedding calls it.

    q [num_tokens, num_qo_heads, head_size]; k [num_tokens, num_kv_heads, head_size]; cos_sin_cache [max_seq_len,
    rotary_dim] float32; positions [num_tokens] -> q_out as q, k_out as k.
    """
    q_out, k_out = q.clone(), k.clone()
    rotary = slice(cos_sin_cache.shape[1])
    apply_rope_with_cos_sin_cache_inplace(
        q_out[..., rotary], k_out[..., rotary], cos_sin_cache, positions, is_neox=True
    )
    return {"q_out": q_out, "k_out": k_out}

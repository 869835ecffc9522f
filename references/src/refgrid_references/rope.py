"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864) with precomputed cosines and sines."""

import torch


def rope_with_cos_sin_cache_neox_style(
    q: torch.Tensor, k: torch.Tensor, cos_sin_cache: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotation of queries and keys, as flashinfer.rope.apply_rope_with_cos_sin_cache(is_neox=True).

    q [num_tokens, num_qo_heads, head_size]; k [num_tokens, num_kv_heads, head_size]; cos_sin_cache [max_seq_len,
    rotary_dim] float32, cosines in the first half of a row and sines in the second; positions [num_tokens], rows of
    cos_sin_cache -> q_out as q, k_out as k. What a head holds beyond rotary_dim stays as it is.
    """
    cos, sin = cos_sin_cache[positions][:, None].chunk(2, dim=-1)  # [num_tokens, 1, rotary_dim / 2]
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pair of numbers i and i + rotary_dim / 2 of each head by angle i (neox style).

    x [num_tokens, heads, head_size]; cos, sin [num_tokens, 1, rotary_dim / 2] -> as x.
    """
    half = cos.shape[-1]
    a, b = x[..., :half].float(), x[..., half : 2 * half].float()
    y = x.clone()
    y[..., :half] = a * cos - b * sin
    y[..., half : 2 * half] = b * cos + a * sin
    return y

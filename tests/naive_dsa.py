"""DeepSeek sparse attention one key, one head and one byte at a time, straight from the definitions' words.

`draw_attention` and `draw_index` also draw inputs: every slot that nobody reads holds NaN, and slots are shuffled.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
TOPK, PAGE_SIZE = 7, 4  # small ones


def sparse_attention(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    sparse_indices: Tensor,
    *,
    sm_scale: float,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """-> output and base-2 lse in `dtype`."""
    output, lse = torch.zeros(q_nope.shape, dtype=dtype), torch.full(q_nope.shape[:2], -math.inf, dtype=dtype)
    page_size = ckv_cache.shape[1]
    for token, row in enumerate(sparse_indices.tolist()):
        places = [divmod(index, page_size) for index in row if index != -1]
        for head in range(q_nope.shape[1] if places else 0):
            scores = []
            for place in places:
                latent = float(q_nope[token, head].to(dtype) @ ckv_cache[place].to(dtype))
                scores.append((latent + float(q_pe[token, head].to(dtype) @ kpe_cache[place].to(dtype))) * sm_scale)
            total = sum(math.exp(score - max(scores)) for score in scores)
            for score, place in zip(scores, places, strict=True):
                output[token, head] += math.exp(score - max(scores)) / total * ckv_cache[place].to(dtype)
            lse[token, head] = (max(scores) + math.log(total)) / math.log(2)
    return output, lse


def e4m3(byte: int) -> float:
    """float8_e4m3fn: sign, four bits of exponent, three of mantissa; no infinity, and one NaN a sign."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 0xF, byte & 7
    if exponent == 0xF and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def key(page: bytes, place: int, page_size: int, d: int) -> list[float]:
    """One key of a page: its values stand one key after the other, and behind those of all keys stand the scales."""
    (scale,) = struct.unpack_from("<f", page, page_size * d + 4 * place)
    return [e4m3(byte) * scale for byte in page[place * d : (place + 1) * d]]


def index_scores(
    q_index_fp8: Tensor,
    k_index_cache_fp8: Tensor,
    weights: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """[batch_size, num_pages * page_size]: the score of each slot that holds a key of the sequence, else -inf."""
    pages, page_size = k_index_cache_fp8.shape[:2]
    scores = torch.full((len(seq_lens), pages * page_size), -math.inf, dtype=dtype)
    for row, length in enumerate(seq_lens.tolist()):
        for j in range(length):
            page = int(block_table[row, j // page_size])
            raw = k_index_cache_fp8[page].flatten().view(torch.uint8).numpy().tobytes()
            k = torch.tensor(key(raw, j % page_size, page_size, q_index_fp8.shape[2]), dtype=dtype)
            dots = [max(0.0, float(q.to(dtype) @ k)) for q in q_index_fp8[row]]
            score = sum(float(w) * dot for w, dot in zip(weights[row], dots, strict=True))
            scores[row, page * page_size + j % page_size] = score
    return scores


def draw_attention(
    keys: list[int],
    page_size: int = 1,
    *,
    topk: int = TOPK,
    slots: int = 24,
    heads: int = 3,
    widths: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Inputs:
    """Tokens with so many keys each: distinct slots at shuffled places of the row, -1 at all others."""
    torch.manual_seed(seed)
    indices = torch.full((len(keys), topk), -1, dtype=torch.int32)
    for row, count in zip(indices, keys, strict=True):
        row[torch.randperm(topk)[:count]] = torch.randperm(slots)[:count].int()
    caches = [torch.full((slots, width), math.nan, dtype=dtype) for width in widths]
    for cache in caches:
        read = indices[indices >= 0].unique().long()
        cache[read] = torch.randn(len(read), cache.shape[1]).to(dtype)
    ckv, kpe = (cache.view(-1, page_size, cache.shape[1]) for cache in caches)
    q = (torch.randn(len(keys), heads, width).to(dtype) for width in widths)
    return {"q_nope": next(q), "q_pe": next(q), "ckv_cache": ckv, "kpe_cache": kpe, "sparse_indices": indices}


def draw_index(
    lengths: list[int],
    *,
    page_size: int = PAGE_SIZE,
    heads: int = 3,
    d: int = 8,
    room: int = 5,
    pages: int = 24,
    seed: int = 0,
) -> Inputs:
    """Sequences on pages of their own, NaN in all other bytes, and in the table pages that do not exist."""
    torch.manual_seed(seed)
    table, order = torch.full((len(lengths), room), 10**6, dtype=torch.int32), torch.randperm(pages).tolist()
    cache = torch.full((pages, page_size * (d + 4)), 0x7F, dtype=torch.uint8)
    cache[:, page_size * d :] = 0xFF
    for row, length in enumerate(lengths):
        for j in range(length):
            if j % page_size == 0:
                table[row, j // page_size] = order.pop()
            page, place = cache[table[row, j // page_size]], j % page_size
            page[place * d : (place + 1) * d] = torch.randn(d).to(torch.float8_e4m3fn).view(torch.uint8)
            scale = (torch.rand(1) + 0.5).view(torch.uint8)
            page[page_size * d + 4 * place : page_size * d + 4 * place + 4] = scale
    return {
        "q_index_fp8": torch.randn(len(lengths), heads, d).to(torch.float8_e4m3fn),
        "k_index_cache_fp8": cache.view(torch.int8).view(pages, page_size, 1, d + 4),
        "weights": torch.randn(len(lengths), heads),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_table": table,
    }

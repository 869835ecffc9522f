"""Absorbed latent attention by FlashMLA, as SGLang's flashmla backend calls it; read in sglang-kernel 0.4.4."""

from __future__ import annotations

import math

import torch
from sgl_kernel.flash_mla import flash_mla_with_kvcache, get_mla_metadata

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.paged import kv_lengths

PAGE_SIZE = 64  # the only one that the kernel is built for


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
    """sgl_kernel.flash_mla.flash_mla_with_kvcache, dense, over one cache of ckv and kpe side by side.

    q_nope [batch_size, num_qo_heads, 512]; q_pe [batch_size, num_qo_heads, 64]; ckv_cache [num_pages, 64, 512];
    kpe_cache [num_pages, 64, 64]; kv_indptr [batch_size + 1], kv_indices [num_kv_indices], kv_last_page_len
    [batch_size], all int32 -> output as q_nope; lse [batch_size, num_qo_heads] float32, base 2. Raises
    Unavailable("unsupported") for pages of another size.
    """
    if ckv_cache.shape[1] != PAGE_SIZE:
        raise Unavailable("unsupported", f"page_size is {ckv_cache.shape[1]} but FlashMLA wants {PAGE_SIZE}")
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, PAGE_SIZE).int()
    q, cache = torch.cat([q_nope, q_pe], dim=-1)[:, None], torch.cat([ckv_cache, kpe_cache], dim=-1)[:, :, None]
    scheduled, num_splits = get_mla_metadata(kv_len, q.shape[2], 1)
    output, lse = flash_mla_with_kvcache(
        q, cache, _block_table(kv_indptr, kv_indices), kv_len, q_nope.shape[2], scheduled, num_splits, sm_scale, False
    )
    # lse is base e, and +inf for a sequence without keys
    no_key = (kv_len == 0)[:, None] & (lse[:, :, 0] == math.inf)
    return {"output": output[:, 0], "lse": torch.where(no_key, -math.inf, lse[:, :, 0] * math.log2(math.e))}


def _block_table(kv_indptr: torch.Tensor, kv_indices: torch.Tensor) -> torch.Tensor:
    """The pages of each sequence, then 0: [batch_size, at least 1], as a first page is loaded even for no key."""
    pages = kv_indptr.diff().long()
    table = kv_indices.new_zeros(len(pages), max(1, int(pages.max())))
    sequence = torch.arange(len(pages), device=pages.device).repeat_interleave(pages)
    position = torch.arange(len(sequence), device=pages.device) - kv_indptr.long()[sequence]
    table[sequence, position] = kv_indices
    return table

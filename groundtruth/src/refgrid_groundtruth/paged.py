"""What a page table says, for adapters whose library wants keys in a row: lengths, slots, and rows without keys."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE_ROWS = 512  # queries handed over at once: bounds the scores of eager attention and the masks


class Tile(NamedTuple):
    """Queries of one sequence and the keys that the last of them sees; right-aligned again, as the sequence was.

    rows: their place in q; q [rows, num_qo_heads, head_dim]; k, v [keys, num_kv_heads, head_dim], keys may be 0; mask
    [rows, keys] in q's dtype, to be added to the scores.
    """

    sequence: int
    rows: slice
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor


def kv_lengths(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor | None, page_size: int) -> torch.Tensor:
    """Keys of each sequence, [batch_size] int64. Without kv_last_page_len every page is full."""
    pages = kv_indptr.diff().long()
    last = page_size if kv_last_page_len is None else kv_last_page_len.long()
    return torch.where(pages > 0, (pages - 1) * page_size + last, 0)


def used_slots(kv_indptr: torch.Tensor, kv_indices: torch.Tensor, kv_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Where each key of each sequence lies in a cache flattened to [num_pages * page_size, ...], in order; int64."""
    sequence = torch.arange(len(kv_len), device=kv_len.device).repeat_interleave(kv_len)
    position = torch.arange(len(sequence), device=kv_len.device) - (kv_len.cumsum(0) - kv_len)[sequence]
    page = kv_indices.long()[kv_indptr.long()[sequence] + position // page_size]
    return page * page_size + position % page_size


def latent(ckv_cache: torch.Tensor, kpe_cache: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Some slots of a latent cache as the key head and the value head that all query heads share.

    ckv_cache [num_pages, page_size, head_dim_ckv]; kpe_cache likewise with head_dim_kpe; slots [keys], flattened
    -> k [keys, 1, head_dim_ckv + head_dim_kpe], v [keys, 1, head_dim_ckv].
    """
    ckv, kpe = ckv_cache.flatten(0, 1)[slots], kpe_cache.flatten(0, 1)[slots]
    return torch.cat([ckv, kpe], dim=-1)[:, None], ckv[:, None]


def sees_no_key(qo_indptr: torch.Tensor, kv_len: torch.Tensor) -> torch.Tensor:
    """Which rows of q see no key when causal is right-aligned, [total_q] bool."""
    qo_len = qo_indptr.diff().long()
    sequence = torch.arange(len(qo_len), device=qo_len.device).repeat_interleave(qo_len)
    row = torch.arange(len(sequence), device=qo_len.device) - qo_indptr.long()[sequence]
    return kv_len[sequence] - qo_len[sequence] + row < 0


def tiles(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qo_indptr: torch.Tensor, kv_len: torch.Tensor
) -> Iterator[Tile]:
    """All queries, sequence by sequence; k, v [sum of kv_len, num_kv_heads, head_dim] are gathered already."""
    kv = [0, *kv_len.cumsum(0).tolist()]
    for sequence, (start, end) in enumerate(pairwise(qo_indptr.tolist())):
        for first in range(start, end, TILE_ROWS):
            last = min(first + TILE_ROWS, end)
            seen = max(kv[sequence + 1] - kv[sequence] - (end - last), 0)
            keys, rows = slice(kv[sequence], kv[sequence] + seen), slice(first, last)
            mask = q.new_full((last - first, seen), float("-inf")).triu(seen - (last - first) + 1)
            yield Tile(sequence, rows, q[rows], k[keys], v[keys], mask)

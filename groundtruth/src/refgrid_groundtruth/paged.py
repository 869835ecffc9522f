"""What a page table says, for adapters whose library wants keys in a row: lengths, slots, and rows without keys."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# Queries handed over at once, and scores of all heads: eager attention holds them five times, in ten bytes each.
TILE_ROWS, SCORES = 512, 2**27


class Piece(NamedTuple):
    """A sequence, or a slice of grouped attention: queries from `start` to `end`, keys from `first` to `last`.

    causal: the last query sees all keys, each one before it one key less.
    """

    start: int
    end: int
    first: int
    last: int
    causal: bool


class Tile(NamedTuple):
    """Queries of one piece and the keys that the last of them sees; right-aligned again, as the piece was.

    rows: their place in q; q [rows, num_qo_heads, head_dim]; k, v [keys, num_kv_heads, head_dim], keys may be 0; mask
    [rows, keys] in q's dtype, to be added to the scores.
    """

    number: int
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
    """All queries of all sequences; k, v [sum of kv_len, num_kv_heads, head_dim] are gathered already."""
    queries, keys = pairwise(qo_indptr.tolist()), pairwise([0, *kv_len.cumsum(0).tolist()])
    return tiles_of(q, k, v, [Piece(*rows, *seen, True) for rows, seen in zip(queries, keys, strict=True)])


def tiles_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: Iterable[Piece]) -> Iterator[Tile]:
    """All queries of all pieces, some of one piece at a time, those with most keys first.

    In their own order each tile of a causal piece would need a little more memory than the last one has left, and a
    GPU's allocator would keep all of it; what the largest leaves is enough for every other.
    """
    cut = [each for number, piece in enumerate(pieces) for each in _cut(number, piece, q.shape[1])]
    for number, rows, keys, causal in sorted(cut, key=lambda tile: tile[2].start - tile[2].stop):
        count, seen = rows.stop - rows.start, keys.stop - keys.start
        mask = q.new_zeros(count, seen)
        if causal:
            mask = torch.full_like(mask, float("-inf")).triu(seen - count + 1)
        yield Tile(number, rows, q[rows], k[keys], v[keys], mask)


def _cut(number: int, piece: Piece, heads: int) -> Iterator[tuple[int, slice, slice, bool]]:
    """The rows of a piece, some at a time, with the keys that the last of them sees."""
    start, end, first, last, causal = piece
    step = max(1, min(TILE_ROWS, SCORES // max(1, heads * (last - first))))
    for row in range(start, end, step):
        rows = slice(row, min(row + step, end))
        seen = max(last - first - (end - rows.stop), 0) if causal else last - first
        yield number, rows, slice(first, first + seen), causal

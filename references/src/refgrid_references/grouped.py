"""Grouped attention: slices of the queries, each with a range of keys that others may share, and a mask of its own."""

import math

import torch

from refgrid_references.attention import BLOCK_KEYS, TILE_ROWS, attend_tiles, by_head
from refgrid_references.blocks import block_elements

CAUSAL = 1  # of the mask types; in the other, 0, every query of a slice sees every key of its range


def gqa_grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    mask_types: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention of slices of q, each to a range of keys; key ranges may overlap.

    q [total_q, num_qo_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim]; q_ranges, k_ranges [num_slices, 2],
    half-open; mask_types [num_slices]
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. In a causal slice of n_q queries and n_k keys, query i
    sees keys j <= i + n_k - n_q of its range. A query that sees no key, or is in no slice, gives 0 and -inf.
    """
    total_q, heads, d = q.shape
    start, row, seen = slice_tiles(q_ranges.long(), k_ranges.long(), mask_types, total_q)
    longest = seen.amax(dim=1).tolist()
    per_key = max(row.shape[1] * heads, k.shape[1] * d)  # elements: scores, gathered keys
    place = torch.arange(k.shape[0], device=k.device)  # of each key in k: as pages of one token, in order
    output = q.new_zeros(total_q + 1, heads, d)  # row total_q takes what tiles hold beyond their end
    lse = q.new_full((total_q + 1, heads), -math.inf, dtype=torch.float32)
    elements, first = block_elements(k.device), 0
    while first < len(longest):
        fit = max(1, elements // (per_key * max(d, min(longest[first], BLOCK_KEYS))))
        count = min(fit, len(longest) - first)
        part, block = slice(first, first + count), max(1, elements // (per_key * count))
        rows = row[part].clamp(max=total_q - 1)
        x = by_head(q[rows], k.shape[1]) * (sm_scale * math.log2(math.e))
        o, lse[row[part]] = attend_tiles(
            [x], [k[:, None]], v[:, None], seen[part], start[part], place, longest[first], block
        )
        output[row[part]] = o.to(output.dtype)
        first += count
    return output[:total_q], lse[:total_q]


def slice_tiles(
    q_ranges: torch.Tensor, k_ranges: torch.Tensor, mask_types: torch.Tensor, total_q: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the slices into tiles of queries, those with most keys first; tiles that see no key are left out.

    -> start [tiles], where the keys of the tile's slice start; row [tiles, size], the query's row in q, total_q where
    the tile ends early; seen [tiles, size], how many keys of its range the query sees, 0 where the tile ends early. All
    int64.
    """
    q_len, k_len = q_ranges.diff(dim=1), k_ranges.diff(dim=1)
    size = int(q_len.max().clamp(1, TILE_ROWS)) if q_len.numel() else 1
    count = (q_len[:, 0] + size - 1) // size  # tiles of each slice
    piece = torch.arange(len(count), device=count.device).repeat_interleave(count)  # the slice of each tile
    tile = torch.arange(len(piece), device=count.device) - (count.cumsum(0) - count)[piece]
    i = tile[:, None] * size + torch.arange(size, device=count.device)  # query within its slice
    n_q, n_k = q_len[piece], k_len[piece]
    row = torch.where(i < n_q, q_ranges[piece, :1] + i, total_q)
    visible = torch.where(mask_types[piece, None] == CAUSAL, n_k - n_q + i + 1, n_k)  # causal: bottom-right
    seen = torch.where(i < n_q, visible, 0).clamp(min=0)
    longest, order = seen.amax(dim=1).sort(descending=True, stable=True)
    order = order[longest > 0]
    return k_ranges[piece, 0][order], row[order], seen[order]

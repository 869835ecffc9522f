"""Scaled dot-product attention over a key/value cache: every layout and variant is one call of `attend`.

Queries are cut into tiles of one sequence and keys into blocks; partial softmaxes are merged exactly (Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867). So memory is bounded however long a sequence or large a cache is.
"""

import math

import torch

from refgrid_references.blocks import block_elements

TILE_ROWS = 64  # queries of one sequence that share the gathered keys
BLOCK_KEYS = 256  # keys of one sequence gathered at once, more where few tiles are left


def paged_lengths(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor | None, page_size: int) -> torch.Tensor:
    """Keys of each sequence, [batch_size] int64: all its pages are full but the last."""
    pages = kv_indptr.diff().long()
    if kv_last_page_len is None:
        return pages * page_size
    return torch.where(pages > 0, (pages - 1) * page_size + kv_last_page_len, 0)


def attend_ragged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values in a row, sequence after sequence: a cache of one token a page, its pages in order.

    q [total_q, num_qo_heads, d_qk]; k [total_kv, num_kv_heads, d_qk]; v likewise with d_vo -> as attend.
    """
    kv_indices = torch.arange(k.shape[0], device=k.device)
    kv_len = paged_lengths(kv_indptr, None, 1)
    return attend([q], [k[:, None]], v[:, None], qo_indptr, kv_indptr, kv_indices, kv_len, sm_scale)


def attend(
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """output = softmax(sm_scale q k^T) v over the keys that a query sees, and the log2-sum-exp2 of its scores.

    q and k in parts of the head that lie apart, their scores add up: q each [total_q, num_qo_heads, d_qk]; k each
    [num_pages, page_size, num_kv_heads, d_qk]; v likewise with d_vo; kv_len [batch_size]
    -> output [total_q, num_qo_heads, d_vo] in q's dtype, lse [total_q, num_qo_heads] float32.
    """
    total_q, heads = q[0].shape[:2]
    sequence, row, seen = tiles(qo_indptr.long(), kv_len)
    pages = kv_indptr.long()[sequence]
    longest = seen.amax(dim=1).tolist()
    d = max(part.shape[3] for part in (*k, v))
    per_key = max(row.shape[1] * heads, v.shape[2] * d)  # elements: scores, gathered keys
    output = q[0].new_zeros(total_q + 1, heads, v.shape[3])  # row total_q takes what tiles hold beyond their end
    lse = q[0].new_full((total_q + 1, heads), -math.inf, dtype=torch.float32)
    elements, first = block_elements(v.device), 0
    while first < len(longest):
        fit = max(1, elements // (per_key * max(d, min(longest[first], BLOCK_KEYS))))
        count = min(fit, len(longest) - first)
        part, block = slice(first, first + count), max(1, elements // (per_key * count))
        rows = row[part].clamp(max=total_q - 1)
        x = [by_head(each[rows], v.shape[2]) * (sm_scale * math.log2(math.e)) for each in q]
        o, lse[row[part]] = attend_tiles(x, k, v, seen[part], pages[part], kv_indices, longest[first], block)
        output[row[part]] = o.to(output.dtype)
        first += count
    return output[:total_q], lse[:total_q]


def tiles(qo_indptr: torch.Tensor, kv_len: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cut the queries into tiles of one sequence, those with most keys first; tiles that see no key are left out.

    -> sequence [tiles]; row [tiles, size], the query's row in q, total_q where the tile ends early; seen [tiles, size],
    how many keys of its sequence the query sees, 0 where the tile ends early. All int64.
    """
    qo_len = qo_indptr.diff()
    size = int(qo_len.max().clamp(1, TILE_ROWS)) if qo_len.numel() else 1
    count = (qo_len + size - 1) // size  # tiles of each sequence
    sequence = torch.arange(len(count), device=count.device).repeat_interleave(count)
    tile = torch.arange(len(sequence), device=count.device) - (count.cumsum(0) - count)[sequence]
    i = tile[:, None] * size + torch.arange(size, device=count.device)  # query within its sequence
    length = qo_len[sequence, None]
    row = torch.where(i < length, qo_indptr[sequence, None] + i, qo_indptr[-1])
    seen = torch.where(i < length, kv_len[sequence, None] - length + i + 1, 0).clamp(min=0)  # causal, bottom-right
    longest, order = seen.amax(dim=1).sort(descending=True, stable=True)
    order = order[longest > 0]
    return sequence[order], row[order], seen[order]


def by_head(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Queries that share the keys of a kv head, in float32.

    q [tiles, size, num_qo_heads, d] -> [tiles, num_kv_heads, group * size, d], group = num_qo_heads / num_kv_heads
    """
    n, size, heads, d = q.shape
    return q.transpose(1, 2).reshape(n, num_kv_heads, heads // num_kv_heads * size, d).float()


def attend_tiles(
    x: list[torch.Tensor],
    k: list[torch.Tensor],
    v: torch.Tensor,
    seen: torch.Tensor,
    pages: torch.Tensor,
    kv_indices: torch.Tensor,
    longest: int,
    block: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the keys of some tiles, block after block, each time rescaled to the running maximum m.

    x each [tiles, num_kv_heads, group * size, d_qk] float32, scaled to base 2; seen [tiles, size]; pages [tiles], where
    each tile's pages start in kv_indices -> o [tiles, size, num_qo_heads, d_vo], lse [tiles, size, num_qo_heads].
    """
    rows, size = x[0].shape[:3], seen.shape[1]
    seen_in_group = seen.repeat(1, rows[2] // size)[:, None, :, None]  # [tiles, 1, group * size, 1]
    m = x[0].new_full((*rows, 1), -math.inf)
    total = x[0].new_zeros(*rows, 1)
    o = x[0].new_zeros(*rows, v.shape[-1])
    for begin in range(0, longest, block):
        j = torch.arange(begin, min(begin + block, longest), device=o.device)
        slot = slots(pages, seen, kv_indices, j, v.shape[1])
        hidden = j >= seen_in_group
        keys = [gather(part, slot) for part in k]
        first, *others = (a @ b.mT for a, b in zip(x, keys, strict=True))
        s = sum(others, first).masked_fill_(hidden, -math.inf)
        m_new = torch.maximum(m, s.amax(dim=-1, keepdim=True))
        base = torch.where(m_new == -math.inf, 0, m_new)  # no key seen yet: exp2(-inf - 0) = 0
        p = s.sub_(base).exp2_()
        decay = torch.exp2(m - base)
        total = total * decay + p.sum(dim=-1, keepdim=True)
        values = keys[0] if v is k[0] else gather(v, slot)  # absorbed MLA reads what it scored
        o = o.mul_(decay).add_(weigh(p, values, hidden))
        m = m_new
    o /= torch.where(total == 0, 1, total)  # no key seen: o is 0 already
    lse = m + torch.log2(total)
    n, heads = rows[0], rows[1] * rows[2] // size
    return o.view(n, heads, size, -1).transpose(1, 2), lse.view(n, heads, size).transpose(1, 2)


def slots(
    pages: torch.Tensor, seen: torch.Tensor, kv_indices: torch.Tensor, j: torch.Tensor, page_size: int
) -> torch.Tensor:
    """Where key number j [block] of each tile lies in the cache, as page * page_size + token: [tiles, block] int64.

    Beyond the tile's last visible key that key is repeated, so an unused slot of the cache is never read.
    """
    j = torch.minimum(j, seen.amax(dim=1, keepdim=True) - 1)  # [tiles, block]
    page = kv_indices[pages[:, None] + j // page_size].long()
    return page * page_size + j % page_size


def gather(cache: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Some slots of a cache in float32: slot [tiles, block] -> [tiles, num_kv_heads, block, d], contiguous."""
    rows = cache.flatten(0, 1).index_select(0, slot.flatten())  # cast after gathering: a cache may be large
    rows = rows.view(*slot.shape, *rows.shape[1:]).transpose(1, 2)
    return rows.to(torch.float32, memory_format=torch.contiguous_format)


def weigh(p: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """p @ v, in which a hidden key adds nothing even if its value is NaN or infinite, though 0 * NaN is NaN.

    p [..., rows, keys], 0 where hidden; v [..., keys, d_vo] -> [..., rows, d_vo].
    """
    o = p @ v
    if not torch.isfinite(o.sum()):
        o = p @ torch.where(torch.isfinite(v), v, 0)
        for value, held in ((math.nan, v.isnan()), (math.inf, v == math.inf), (-math.inf, v == -math.inf)):
            hit = (~hidden).to(p.dtype) @ held.to(p.dtype)  # how many visible keys hold this value
            o = torch.where(hit > 0, o + value, o)
    return o

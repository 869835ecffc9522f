"""DeepSeek sparse attention (DeepSeek-V3.2-Exp 2025): an indexer chooses keys, absorbed MLA attends to those alone.

Both work through their tokens or pages in chunks, gathering before casting, so that memory is bounded however large
a cache is.
"""

import math

import torch

from refgrid_references.blocks import block_elements


def dsa_sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sparse_indices: torch.Tensor,
    *,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Absorbed MLA of each token over its own choice of keys.

    q_nope [num_tokens, num_qo_heads, head_dim_ckv]; q_pe [num_tokens, num_qo_heads, head_dim_kpe]; ckv_cache
    [num_pages, page_size, head_dim_ckv]; kpe_cache [num_pages, page_size, head_dim_kpe]; sparse_indices
    [num_tokens, topk] int32, page * page_size + offset, or -1 for none
    -> output as q_nope; lse [num_tokens, num_qo_heads] float32, base 2. A token without keys gives 0 and -inf.
    """
    output = torch.empty_like(q_nope)
    lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32)
    index = sparse_indices.sort(dim=1, descending=True).values  # the keys of a token are a set: none comes last
    keys, order = (index >= 0).sum(dim=1).sort(descending=True, stable=True)  # tokens with most keys first
    caches, keys = (ckv_cache.flatten(0, 1), kpe_cache.flatten(0, 1)), keys.clamp(min=1).tolist()
    elements, first = block_elements(ckv_cache.device), 0
    while first < len(keys):
        fit = max(1, elements // (keys[first] * (ckv_cache.shape[2] + kpe_cache.shape[2])))
        part = order[first : first + fit]
        q = (q_nope[part].float(), q_pe[part].float())
        o, lse[part] = attend_to_chosen(*q, *caches, index[part, : keys[first]].long(), sm_scale)
        output[part] = o.to(q_nope.dtype)
        first += fit
    return output, lse


def attend_to_chosen(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    index: torch.Tensor,
    sm_scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o = softmax(sm_scale (q_nope ckv^T + q_pe kpe^T)) ckv, each token with its own keys.

    q_nope [n, heads, d_ckv], q_pe [n, heads, d_kpe] float32; caches [slots, d]; index [n, keys] int64
    -> o [n, heads, d_ckv], lse [n, heads], float32.
    """
    chosen = index >= 0
    # in place of no key, one that the token chose and that is masked: an unused slot of the cache is never read
    slot = torch.where(chosen, index, index.amax(dim=1, keepdim=True)).clamp(min=0)
    ckv, kpe = gather_slots(ckv_cache, slot), gather_slots(kpe_cache, slot)  # [n, keys, d]
    s = (q_nope @ ckv.mT + q_pe @ kpe.mT) * (sm_scale * math.log2(math.e))  # [n, heads, keys]
    s = s.masked_fill_(~chosen[:, None], -math.inf)
    some = chosen.any(dim=1)[:, None, None]
    m = torch.where(some, s.amax(dim=2, keepdim=True), 0)
    p = torch.exp2(s - m)
    total = p.sum(dim=2, keepdim=True)
    o = torch.where(some, p @ ckv / total, 0)
    return o, (m + torch.log2(total)).squeeze(2)


def gather_slots(cache: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
    """Some slots of a cache [slots, d] in float32: slot [n, keys] -> [n, keys, d]."""
    return cache.index_select(0, slot.flatten()).float().view(*slot.shape, -1)


def dsa_topk_indexer_fp8(
    q_index_fp8: torch.Tensor,
    k_index_cache_fp8: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    topk: int,
) -> torch.Tensor:
    """The keys of highest score of each sequence, score = sum over heads of weights * relu(q k), in any order.

    q_index_fp8 [batch_size, num_index_heads, index_head_dim] float8; k_index_cache_fp8 [num_pages, page_size, 1,
    index_head_dim + 4] int8, laid out as `unpack_pages` says; weights [batch_size, num_index_heads] float32; seq_lens
    [batch_size] int32; block_table [batch_size, max_num_pages] int32, read as far as a sequence goes
    -> topk_indices [batch_size, topk] int32: page * page_size + offset, -1 behind the last of fewer than topk keys.
    """
    page_size = k_index_cache_fp8.shape[1]
    scores = index_scores(q_index_fp8, k_index_cache_fp8, weights, seq_lens, block_table)
    position = torch.arange(scores.shape[1], device=scores.device)
    scores = scores.masked_fill_(position >= seq_lens[:, None], -math.inf)
    best = scores.topk(min(topk, scores.shape[1]), dim=1).indices  # [batch_size, at most topk], best first
    page = block_table.gather(1, best // page_size)
    slot = torch.where(best < seq_lens[:, None], page * page_size + best % page_size, -1)
    return torch.nn.functional.pad(slot, (0, topk - slot.shape[1]), value=-1).to(torch.int32)


def index_scores(
    q_index_fp8: torch.Tensor,
    k_index_cache_fp8: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> torch.Tensor:
    """score[b, j] = sum over h of weights[b, h] * relu(q[b, h] . k[b, j]), k scaled, for whole pages.

    -> [batch_size, pages of the longest sequence * page_size] float32, undefined beyond a sequence's last page.
    """
    (batch, heads, d), page_size = q_index_fp8.shape, k_index_cache_fp8.shape[1]
    used = torch.arange(block_table.shape[1], device=seq_lens.device) * page_size < seq_lens[:, None]
    sequence, number = used.nonzero(as_tuple=True)  # every page of every sequence
    longest = int(used.sum(dim=1).max()) if batch else 0
    scores = torch.zeros(batch, longest, page_size, device=weights.device)
    q = q_index_fp8.float()
    pages = max(1, block_elements(q.device) // (max(heads, page_size) * max(d, page_size)))
    for b, i in zip(sequence.split(pages), number.split(pages), strict=True):
        k = unpack_pages(k_index_cache_fp8, block_table[b, i], d)  # [n, page_size, d]
        s = torch.relu(q[b] @ k.mT)  # [n, heads, page_size]
        scores[b, i] = (weights[b, None] @ s).squeeze(1)
    return scores.flatten(1)


def unpack_pages(cache: torch.Tensor, page: torch.Tensor, d: int) -> torch.Tensor:
    """Keys of some pages in float32: page [n] -> [n, page_size, d].

    The bytes of a page are page_size * d float8_e4m3fn values, then page_size float32 scales, one a key.
    """
    page_size = cache.shape[1]
    held = cache.flatten(1).index_select(0, page)  # [n, page_size * (d + 4)] bytes
    values = held[:, : page_size * d].view(torch.float8_e4m3fn).unflatten(1, (page_size, d))
    scales = held[:, page_size * d :].view(torch.float32)
    return values.float() * scales[:, :, None]

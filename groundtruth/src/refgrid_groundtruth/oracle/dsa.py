"""DeepSeek sparse attention in float64, token by token, and the scores that an indexer chooses by."""

from __future__ import annotations

import math

import torch


def dsa_sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sparse_indices: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """A softmax over the keys that a token has, gathered for it alone. Shapes as in the definition."""
    output = torch.zeros_like(q_nope)
    lse = torch.full(q_nope.shape[:2], -math.inf, dtype=torch.float32, device=q_nope.device)
    ckv, kpe = ckv_cache.flatten(0, 1), kpe_cache.flatten(0, 1)
    for token, indices in enumerate(sparse_indices.long()):
        slots = indices[indices >= 0]
        if not len(slots):
            continue
        values = ckv[slots].double()
        scores = q_nope[token].double() @ values.T + q_pe[token].double() @ kpe[slots].double().T
        scores = scores * sm_scale
        output[token] = (scores.softmax(dim=1) @ values).to(q_nope.dtype)
        lse[token] = (scores.logsumexp(dim=1) / math.log(2)).float()
    return {"output": output, "lse": lse}


def dsa_topk_indexer_fp8(
    q_index_fp8: torch.Tensor,
    k_index_cache_fp8: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The law of the choice: scores [batch_size, num_pages * page_size] float64 of every slot, -inf for no key.

    Keys are taken from the bytes of their page one by one: byte page_size * d + 4 t is where the scale of key t begins.
    """
    pages, page_size = k_index_cache_fp8.shape[:2]
    raw = k_index_cache_fp8.reshape(pages, -1).view(torch.uint8)
    d = q_index_fp8.shape[2]
    q, w = q_index_fp8.double(), weights.double()
    scores = torch.full((len(q), pages * page_size), -math.inf, dtype=torch.float64, device=q.device)
    for row, length in enumerate(seq_lens.tolist()):
        position = torch.arange(length, device=q.device)
        page, place = block_table[row].long()[position // page_size], position % page_size
        number = torch.arange(d, device=q.device)
        keys = raw[page[:, None], place[:, None] * d + number].view(torch.float8_e4m3fn).double()
        four = page_size * d + 4 * place[:, None] + torch.arange(4, device=q.device)
        scale = raw[page[:, None], four].view(torch.float32).double()
        dots = torch.einsum("hd,td->th", q[row], keys * scale)
        scores[row, page * page_size + place] = (dots.clamp(min=0) * w[row]).sum(dim=1)
    return {"topk_indices": scores}

"""DeepSeek sparse attention by FlashMLA and DeepGEMM, as SGLang's dsa backend and indexer call them.

Read in sglang 0.5.15, sglang-kernel 0.4.4 and sgl-deep-gemm 0.1.4, and in FlashMLA's sources for SM90.
"""

from __future__ import annotations

import math

import torch
from sgl_kernel.flash_mla import flash_mla_sparse_fwd

HEADS = 64  # FlashMLA's sparse kernel is built for 64 and 128 query heads


def dsa_sparse_attention(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    ckv_cache: torch.Tensor,
    kpe_cache: torch.Tensor,
    sparse_indices: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """sgl_kernel.flash_mla.flash_mla_sparse_fwd over one row of keys, ckv and kpe side by side; heads are filled up.

    q_nope [num_tokens, num_qo_heads, 512]; q_pe [num_tokens, num_qo_heads, 64]; ckv_cache [num_pages, page_size, 512];
    kpe_cache [num_pages, page_size, 64]; sparse_indices [num_tokens, topk] int32, topk a multiple of 128 and -1 for
    none, which the kernel skips wherever it stands -> output as q_nope; lse [num_tokens, num_qo_heads] float32, base 2.
    """
    heads, d_v = q_nope.shape[1:]
    q = torch.nn.functional.pad(torch.cat([q_nope, q_pe], dim=-1), (0, 0, 0, -heads % HEADS))
    kv = torch.cat([ckv_cache, kpe_cache], dim=-1).flatten(0, 1)[:, None]
    output, _, lse = flash_mla_sparse_fwd(q, kv, sparse_indices[:, None], sm_scale, d_v)
    # lse is base 2, and +inf for a token without keys
    no_key = (sparse_indices < 0).all(dim=1)[:, None] & (lse[:, :heads] == math.inf)
    lse = torch.where(no_key, -math.inf, lse[:, :heads])
    return {"output": output[:, :heads].contiguous(), "lse": lse}


def dsa_topk_indexer_fp8(
    q_index_fp8: torch.Tensor,
    k_index_cache_fp8: torch.Tensor,
    weights: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """deep_gemm.fp8_paged_mqa_logits: the law of the choice, by slot where the kernel gives it by position.

    q_index_fp8 [batch_size, num_index_heads, 128] float8_e4m3fn; k_index_cache_fp8 [num_pages, 64, 1, 132] int8;
    weights [batch_size, num_index_heads] float32; seq_lens [batch_size], block_table [batch_size, max_num_pages] int32
    -> scores [batch_size, num_pages * 64] float64, -inf for what is no key of the sequence; the kernel leaves its
    float32 logits beyond a sequence undefined.
    """
    import deep_gemm  # a distribution of its own, which attention does without

    pages, page_size = k_index_cache_fp8.shape[:2]
    lengths, room = seq_lens[:, None], block_table.shape[1] * page_size
    schedule = deep_gemm.get_paged_mqa_logits_metadata(lengths, page_size, deep_gemm.get_num_sms())
    cache = k_index_cache_fp8.view(torch.uint8)  # the bytes as the kernel wants them called
    logits = deep_gemm.fp8_paged_mqa_logits(
        q_index_fp8[:, None], cache, weights, lengths, block_table, schedule, room, clean_logits=False
    )
    position = torch.arange(room, device=lengths.device)
    slots = block_table.long()[:, position // page_size] * page_size + position % page_size
    row, place = (position < lengths).nonzero(as_tuple=True)
    scores = torch.full((len(logits), pages * page_size), -math.inf, dtype=torch.float64, device=logits.device)
    scores[row, slots[row, place]] = logits[row, place].double()
    return {"topk_indices": scores}

"""Equal scores over chosen keys, and an indexer whose keys are known apart by their first number."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

HEADS, CKV, KPE, TOPK, PAGE_SIZE = 16, 512, 64, 2048, 64


def _dsa_sparse_attention() -> Answer:
    """Three keys of four of two pages for token 0, one for token 1, none for token 2.

    ckv is its slot's number beyond the first component, which is 1 and meets q. Head h scores each key h / 8, so the
    output is the mean of the values and lse = log2(keys) + h / 8 log2(e); without keys 0 and -inf.
    """
    ckv = torch.full((2, PAGE_SIZE, CKV), math.nan, dtype=torch.bfloat16)
    kpe = ckv[..., :KPE].clone()
    flat, rotary = ckv.view(-1, CKV), kpe.view(-1, KPE)
    for slot in (3, 64, 127, 9):
        flat[slot], rotary[slot] = float(slot), 0.0
        flat[slot, 0] = 1.0
    indices = torch.full((3, TOPK), -1, dtype=torch.int32)
    indices[0, [0, 5, 2047]] = torch.tensor([127, 3, 64], dtype=torch.int32)
    indices[1, 1] = 9
    q_nope = torch.zeros(3, HEADS, CKV, dtype=torch.bfloat16)
    q_nope[:, :, 0] = torch.arange(HEADS)
    given = {"q_nope": q_nope, "q_pe": torch.zeros(3, HEADS, KPE, dtype=torch.bfloat16), "ckv_cache": ckv}
    output = torch.tensor([(127 + 3 + 64) / 3, 9.0, 0.0]).view(3, 1, 1).repeat(1, HEADS, CKV)
    output[:2, :, 0] = 1.0
    lse = torch.tensor([math.log2(3), 0.0, -math.inf])[:, None] + torch.arange(HEADS) / 8 * math.log2(math.e)
    given |= {"kpe_cache": kpe, "sparse_indices": indices, "sm_scale": 0.125}
    return given, {"output": output.bfloat16(), "lse": lse.float()}


def _dsa_topk_indexer_fp8() -> Answer:
    """One sequence of 65 keys on pages 2 and 0 of three. The law: key t scores 64 heads of 1 times t mod 16 times 1/2.

    Byte 64 * 128 of a page is where its scales begin.
    """
    cache = torch.full((3, PAGE_SIZE * 132), -1, dtype=torch.int8)
    values = cache[:, : PAGE_SIZE * 128].view(torch.float8_e4m3fn).view(3, PAGE_SIZE, 128)
    scores = torch.full((1, 3 * PAGE_SIZE), -math.inf, dtype=torch.float64)
    for t in range(65):
        page, place = (2, 0)[t // PAGE_SIZE], t % PAGE_SIZE
        key = torch.zeros(128)
        key[0] = t % 16
        values[page, place] = key.to(torch.float8_e4m3fn)
        begin = PAGE_SIZE * 128 + 4 * place
        cache[page, begin : begin + 4] = torch.tensor([0.5]).view(torch.int8)
        scores[0, page * PAGE_SIZE + place] = 64 * (t % 16) * 0.5
    q = torch.zeros(1, 64, 128)
    q[:, :, 0] = 1.0
    given = {
        "q_index_fp8": q.to(torch.float8_e4m3fn),
        "k_index_cache_fp8": cache.view(3, PAGE_SIZE, 1, 132),
        "weights": torch.ones(1, 64),
        "seq_lens": torch.tensor([65], dtype=torch.int32),
        "block_table": torch.tensor([[2, 0, -1]], dtype=torch.int32),
    }
    return given, {"topk_indices": scores}


CASES: dict[str, Callable[[], Answer]] = {
    "dsa_sparse_attention": _dsa_sparse_attention,
    "dsa_topk_indexer_fp8": _dsa_topk_indexer_fp8,
}

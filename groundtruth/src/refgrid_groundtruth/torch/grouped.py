"""Grouped attention by the operators of `gqa`: slice by slice on a CPU, on CUDA a call a mask on copies of the keys.

Queries in no slice are not handed over: nothing attends for them. Run with torch 2.13 on a CPU.
"""

from __future__ import annotations

import math

import torch

from refgrid_groundtruth.grouped import sees_no_key, slices
from refgrid_groundtruth.paged import Piece, tiles_of
from refgrid_groundtruth.torch.gqa import attend_on_cuda, attend_tiles


def gqa_grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    mask_types: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """aten::_scaled_dot_product_flash_attention_for_cpu, or aten::_flash_attention_forward on CUDA.

    q [total_q, num_qo_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim]; q_ranges, k_ranges [num_slices, 2],
    mask_types [num_slices], all int32 -> output as q; lse [total_q, num_qo_heads] float32, base 2.
    """
    output, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    (_on_cuda if q.is_cuda else _on_cpu)(q, k, v, slices(q_ranges, k_ranges, mask_types), sm_scale, output, lse)
    return {"output": output, "lse": lse * math.log2(math.e)}


def _on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: list[Piece],
    sm_scale: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Into output, and into lse in base e; a query without keys has a marker of 0 there, see `attend_tiles`."""
    own = list(tiles_of(q, k, v, pieces))
    out, log = attend_tiles(q, own, sm_scale)
    for tile in own:
        no_key = tile.mask.isneginf().all(dim=1, keepdim=True) & (log[tile.rows] == 0)
        output[tile.rows], lse[tile.rows] = out[tile.rows], torch.where(no_key, -math.inf, log[tile.rows])


def _on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pieces: list[Piece],
    sm_scale: float,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Into output, and into lse in base e; a query without keys has a marker of +inf there, see `attend_on_cuda`."""
    for causal in (False, True):
        own = [piece for piece in pieces if piece[4] == causal and piece[0] < piece[1]]
        if not own:
            continue
        rows = torch.cat([torch.arange(start, end) for start, end, *_ in own]).to(q.device)
        keys = torch.cat([torch.arange(first, last) for _, _, first, last, _ in own]).to(q.device)
        qo_len, kv_len = torch.tensor([(end - start, last - first) for start, end, first, last, _ in own]).T.to(
            q.device
        )
        qo_indptr = torch.nn.functional.pad(qo_len.cumsum(0), (1, 0)).int()
        output[rows], found, marker = attend_on_cuda(q[rows], k[keys], v[keys], qo_indptr, kv_len, sm_scale, causal)
        no_key = sees_no_key(own, q.device)[:, None] & (found == marker)
        lse[rows] = torch.where(no_key, -math.inf, found)

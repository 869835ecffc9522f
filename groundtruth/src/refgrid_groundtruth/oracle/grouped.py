"""Grouped attention in float64, slice by slice."""

from __future__ import annotations

import math

import torch

from refgrid_groundtruth.oracle.attention import SCORES, softmax_over


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
    """q [total_q, num_qo_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim]; ranges [num_slices, 2].

    mask_types [num_slices], 1 for causal -> output as q; lse [total_q, num_qo_heads] float32, base 2.
    """
    output = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    for (start, end), keys, mask in zip(q_ranges.tolist(), k_ranges.tolist(), mask_types.tolist(), strict=True):
        own_k, own_v = (each[slice(*keys)].double() for each in (k, v))
        step = max(1, SCORES // max(1, q.shape[1] * len(own_k)))
        for i in range(start, end, step):
            rows = torch.arange(i, min(i + step, end), device=q.device)
            to_the_last = end - 1 - rows if mask == 1 else torch.zeros_like(rows)
            sees = len(own_k) - to_the_last  # the first so many keys
            rows, sees = rows[sees > 0], sees[sees > 0]
            if len(rows):
                out, log = softmax_over(q[rows].double(), own_k, own_v, sees, sm_scale)
                output[rows], lse[rows] = out.to(q.dtype), log.float()
    return {"output": output, "lse": lse}

"""Grouped attention with equal scores, whose output is a mean."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

QO_HEADS, KV_HEADS, HEAD_DIM, KEYS, SM_SCALE = 8, 2, 128, 7, 0.125
# Queries from and to, keys from and to, causal. Query 2 is in no slice, and the keys 3 and 4 are in two; 0 in none.
SLICES = ((3, 6, 1, 5, True), (0, 2, 3, 7, False))
SEEN = ((3, 7), (3, 7), (0, 0), (1, 3), (1, 4), (1, 5))  # of each query the keys from and to


def _gqa_grouped() -> Answer:
    """Head h scores each key SM_SCALE * h, so the weights are uniform: lse = log2(keys) + SM_SCALE * h * log2(e).

    k is 1 in the first component and v tells position and head; the output is the mean of what is seen.
    """
    q = torch.zeros(len(SEEN), QO_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    q[:, :, 0] = torch.arange(QO_HEADS)
    k = torch.zeros(KEYS, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    k[:, :, 0] = 1
    value = 2.0 * torch.arange(KEYS)[:, None] + 16 * torch.arange(KV_HEADS)
    k[0], value[0] = 1e4, 1e4  # nobody sees it
    v = value[:, :, None].expand(-1, -1, HEAD_DIM).to(torch.bfloat16)
    mean = torch.stack([value[first:last].sum(0) / max(1, last - first) for first, last in SEEN])
    count = torch.tensor([[float(last - first)] for first, last in SEEN])
    lse = count.log2() + SM_SCALE * math.log2(math.e) * torch.arange(QO_HEADS)
    output = mean.repeat_interleave(QO_HEADS // KV_HEADS, dim=1)[:, :, None].expand(-1, -1, HEAD_DIM)
    table = torch.tensor(SLICES, dtype=torch.int32)
    ranges = {"q_ranges": table[:, :2].clone(), "k_ranges": table[:, 2:4].clone(), "mask_types": table[:, 4].clone()}
    return {"q": q, "k": k, "v": v, **ranges, "sm_scale": SM_SCALE}, {"output": output.to(torch.bfloat16), "lse": lse}


CASES: dict[str, Callable[[], Answer]] = {"gqa_grouped": _gqa_grouped}

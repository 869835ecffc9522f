"""Attention in float64, one sequence and a few queries at a time: a whole row of scores, one softmax, one product."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Keys = Callable[[int], tuple[torch.Tensor, torch.Tensor]]

SCORES = 2**27  # at once: 1 GiB


def causal(q: torch.Tensor, keys: Keys, qo_indptr: torch.Tensor, d_vo: int, sm_scale: float) -> dict[str, torch.Tensor]:
    """Causal attention, right-aligned; q [total_q, num_qo_heads, d_qk], in order.

    keys(sequence) -> k [kv_len, num_kv_heads, d_qk], v [kv_len, num_kv_heads, d_vo]
    -> output [total_q, num_qo_heads, d_vo] in q's dtype, lse [total_q, num_qo_heads] float32, base 2.
    """
    output = q.new_zeros(*q.shape[:2], d_vo)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float32)
    for sequence, (start, end) in enumerate(pairwise(qo_indptr.tolist())):
        k, v = (each.double() for each in keys(sequence))
        first = max(start, end - len(k))  # earlier queries see no key
        step = max(1, SCORES // max(1, q.shape[1] * len(k)))
        for i in range(first, end, step):
            rows = slice(i, min(i + step, end))
            sees = len(k) - (end - 1 - torch.arange(rows.start, rows.stop, device=q.device))  # the first so many keys
            out, log = softmax_over(q[rows].double(), k, v, sees, sm_scale)
            output[rows], lse[rows] = out.to(q.dtype), log.float()
    return {"output": output, "lse": lse}


def softmax_over(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows, heads, d_qk], k and v [keys, kv_heads, d], sees [rows] at least 1 -> output and lse of these rows."""
    rows, heads, _ = q.shape
    grouped = q.view(rows, k.shape[1], -1, q.shape[2])
    scores = torch.einsum("rhgd,khd->rhgk", grouped, k) * sm_scale
    later = torch.arange(len(k), device=q.device) >= sees[:, None, None, None]
    scores = scores.masked_fill(later, -math.inf)
    out = torch.einsum("rhgk,khd->rhgd", scores.softmax(dim=-1), v)
    return out.reshape(rows, heads, -1), scores.logsumexp(dim=-1).view(rows, heads) / math.log(2)


def ragged(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, sm_scale: float
) -> dict[str, torch.Tensor]:
    """Keys and values in a row, sequence after sequence; as `causal`."""
    bounds = kv_indptr.tolist()

    def keys(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(bounds[sequence], bounds[sequence + 1])
        return k[part], v[part]

    return causal(q, keys, qo_indptr, v.shape[2], sm_scale)

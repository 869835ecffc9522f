"""Grouped attention from its definition: a dense mask made key by key, one softmax over it, gradients by autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Entry = tuple[int, int, int, int, int]


def visible(entry: Entry, row: int, key: int) -> bool:
    """Whether the row sees the key by this slice (q_start, q_end, k_start, k_end, mask_type)."""
    q_start, q_end, k_start, k_end, mask_type = entry
    inside = q_start <= row < q_end and k_start <= key < k_end
    diagonal = (key - k_start) <= (row - q_start) + (k_end - k_start) - (q_end - q_start)
    return inside and (mask_type == 0 or diagonal)


def dense_mask(entries: Sequence[Entry], total_q: int, total_k: int) -> torch.Tensor:
    """[total_q, total_k], True where the row sees the key."""
    seen = [[any(visible(entry, row, key) for entry in entries) for key in range(total_k)] for row in range(total_q)]
    return torch.tensor(seen, dtype=torch.bool).reshape(total_q, total_k)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every step in the tensors' own dtype: q [n, hq, d], k and v [m, hk, d] -> out as q, lse [hq, n]."""
    heads = q.shape[1] // k.shape[1]
    k, v = (keys.repeat_interleave(heads, dim=1) for keys in (k, v))
    scores = (torch.einsum("nhd,mhd->hnm", q, k) * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    sees = mask.any(-1)
    weights = torch.where(sees[:, None], scores, 0).softmax(-1) * mask
    return torch.einsum("hnm,mhd->nhd", weights, v), lse


def gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, dout: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of attend's out: dq, dk, dv."""
    q, k, v = (tensor.detach().clone().requires_grad_() for tensor in (q, k, v))
    out, _ = attend(q, k, v, mask, scale)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return dq, dk, dv

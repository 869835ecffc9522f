"""Grouped attention from its definition: a dense mask, one softmax over it, gradients by autograd; the same as a flash
kernel rounds it; and how far off something may be that computes it.
"""

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


def dense_mask(entries: Sequence[Entry], total_q: int, total_k: int, device: str = "cpu") -> torch.Tensor:
    """[total_q, total_k], True where the row sees the key: the same, all rows and keys at once."""
    rows, keys = torch.arange(total_q, device=device)[:, None], torch.arange(total_k, device=device)
    seen = torch.zeros(total_q, total_k, dtype=torch.bool, device=device)
    for q_start, q_end, k_start, k_end, mask_type in entries:
        inside = (rows >= q_start) & (rows < q_end) & (keys >= k_start) & (keys < k_end)
        seen |= inside & ((keys - k_end <= rows - q_end) if mask_type else inside)
    return seen


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


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float, dout: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """out, lse, dq, dk, dv, rounded where a flash kernel rounds: weights, their gradients, and what comes out.

    The rest is in float32. Scores of about 100, in bfloat16, would be off by as much as decides which key wins: the
    formula in its own dtype is then no yardstick, as its errors are as large as its values.
    """
    dtype, share = q.dtype, q.shape[1] // k.shape[1]
    q, k, v, dout = (tensor.float() for tensor in (q, k, v, dout))
    wide_k, wide_v = (keys.repeat_interleave(share, dim=1) for keys in (k, v))
    scores = (torch.einsum("nhd,mhd->hnm", q, wide_k) * scale).masked_fill(~mask, -math.inf)
    lse = scores.logsumexp(-1)
    weights = torch.where(mask, (scores - lse[..., None]).exp(), 0)
    rounded = weights.to(dtype).float()
    out = torch.einsum("hnm,mhd->nhd", rounded, wide_v).to(dtype)
    delta = (dout * out.float()).sum(-1).T[..., None]
    d_scores = (weights * (torch.einsum("nhd,mhd->hnm", dout, wide_v) - delta)).to(dtype).float()
    dq = torch.einsum("hnm,mhd->nhd", d_scores, wide_k) * scale
    of_keys = torch.einsum("hnm,nhd->mhd", d_scores, q) * scale, torch.einsum("hnm,nhd->mhd", rounded, dout)
    dk, dv = (gradient.unflatten(1, (-1, share)).sum(2).to(dtype) for gradient in of_keys)
    return out, lse, dq.to(dtype), dk, dv


def hold_to_twice(
    name: str,
    found: torch.Tensor,
    low: torch.Tensor,
    truth: torch.Tensor,
    *,
    largest: float = 2,
    rms: float = 1.5,
    by_row: bool = False,
) -> None:
    """Raise unless found [rows, ...] is as near to truth as low is, up to the factors; low is the formula in its dtype.

    by_row: with each row over its norm, too, as the large values of rows with few keys hide the small ones of rows with
    many (not for what may cancel: a row with one key has dq = 0). Beyond the factors, half a unit in the last place of
    the largest value is allowed: that much any rounded result may be off.
    """
    assert found.isfinite().all(), f"{name} has {(~found.isfinite()).sum()} elements that are not finite"
    unit = torch.finfo(low.dtype).eps / 2
    sizes = {"": torch.ones_like(truth[:, :1, :1]), **({" over the norm of its row": _norm(truth)} if by_row else {})}
    for way, size in sizes.items():
        off, low_off = ((tensor.double() - truth) / size for tensor in (found, low))
        most = unit * (truth / size).abs().max()
        _hold(f"{name}'s largest error{way}", off.abs().max(), largest * low_off.abs().max() + most)
        _hold(f"{name}'s rms error{way}", _rms(off), rms * _rms(low_off) + most / 4)


def _norm(truth: torch.Tensor) -> torch.Tensor:
    """Of each row and head; 1 where it is zero."""
    norm = truth.square().mean(-1, keepdim=True).sqrt()
    return torch.where(norm == 0, 1, norm)


def _rms(off: torch.Tensor) -> torch.Tensor:
    return off.square().mean().sqrt()


def _hold(what: str, value: torch.Tensor, limit: torch.Tensor) -> None:
    assert value <= limit, f"{what} = {value:.3e}, but should be at most {limit:.3e}"

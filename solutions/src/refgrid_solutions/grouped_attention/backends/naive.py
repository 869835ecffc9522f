"""The formula itself, in float32, or float64 where the inputs are: one block of rows of one slice after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan
from refgrid_solutions.grouped_attention.ranges import CAUSAL, Slice

# Scores of one block; a few tensors of this size live at a time.
_SCORES = {"cpu": 2**22, "cuda": 2**27}


def refuses(plan: GroupedAttnPlan) -> str:  # noqa: ARG001 - every backend is asked
    """Nothing: it runs any plan."""
    return ""


def metadata(plan: GroupedAttnPlan, both: bool) -> Sequence[torch.Tensor]:  # noqa: ARG001 - every backend is asked
    """Nothing: the slices are read on the host."""
    return ()


class _Block(NamedTuple):
    """Which rows and keys; hidden [rows, keys], or None where all is visible."""

    rows: slice
    keys: slice
    hidden: torch.Tensor | None


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale q k^T) v over the keys that each row sees, and the log-sum-exp of the scaled scores.

    q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim] -> out as q; lse [num_heads_q,
    total_q], natural logarithm, float32 (float64 for float64). A row that sees no key gives 0 and -inf.
    """
    wide = _wide(q.dtype)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), -math.inf, dtype=wide, device=q.device)
    for block in _blocks(plan):
        p, row_lse = _softmax(q, k, block, plan, scale)
        out[block.rows] = _rows_first(p @ _per_head(v, block.keys, wide)).to(q.dtype)
        lse[:, block.rows] = row_lse.flatten(0, 1)
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,  # noqa: ARG001 - it was rounded: the row sums come from p and dp
    lse: torch.Tensor,  # noqa: ARG001 - likewise
    plan: GroupedAttnPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each as its tensor; those of k and v are summed wide and rounded once."""
    wide = _wide(q.dtype)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
    for block in _blocks(plan):
        p, _ = _softmax(q, k, block, plan, scale)
        d_rows = _grouped(dout, block.rows, plan, wide)
        dp = d_rows @ _per_head(v, block.keys, wide).mT
        ds = scale * p * (dp - (p * dp).sum(-1, keepdim=True))
        dq[block.rows] = _rows_first(ds @ _per_head(k, block.keys, wide)).to(q.dtype)
        dk[block.keys] += (ds.mT @ _grouped(q, block.rows, plan, wide)).sum(1).transpose(0, 1)
        dv[block.keys] += (p.mT @ d_rows).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, block: _Block, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [h, g, n, m] and log-sum-exp [h, g, n] of a block, in which every row sees a key."""
    wide = _wide(q.dtype)
    scores = scale * (_grouped(q, block.rows, plan, wide) @ _per_head(k, block.keys, wide).mT)
    if block.hidden is not None:
        scores.masked_fill_(block.hidden, -math.inf)
    return scores.softmax(-1), scores.logsumexp(-1)


def _blocks(plan: GroupedAttnPlan) -> Iterator[_Block]:
    """Blocks of rows that see a key, with the keys up to the last that one of them sees."""
    for piece in plan.slices:
        budget = _SCORES.get(plan.device.type, _SCORES["cpu"]) // (plan.num_heads_q * max(piece.num_keys, 1))
        for first in range(piece.blind_rows, piece.num_rows, max(budget, 1)):
            last = min(first + max(budget, 1), piece.num_rows)
            yield _block(piece, first, last, plan.device)


def _block(piece: Slice, first: int, last: int, device: torch.device) -> _Block:
    count = piece.visible(last - 1)
    rows = slice(piece.q_start + first, piece.q_start + last)
    keys = slice(piece.k_start, piece.k_start + count)
    if piece.mask_type != CAUSAL:
        return _Block(rows, keys, None)
    seen = torch.arange(piece.visible(first), count + 1, device=device)
    return _Block(rows, keys, torch.arange(count, device=device) >= seen[:, None])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _grouped(rows: torch.Tensor, part: slice, plan: GroupedAttnPlan, wide: torch.dtype) -> torch.Tensor:
    """[n, num_heads_q, d] -> [num_heads_k, g, n, d], wide."""
    heads = rows[part].to(wide).unflatten(1, (plan.num_heads_k, -1))
    return heads.permute(1, 2, 0, 3)


def _per_head(keys: torch.Tensor, part: slice, wide: torch.dtype) -> torch.Tensor:
    """[m, num_heads_k, d] -> [num_heads_k, 1, m, d], wide."""
    return keys[part].to(wide).transpose(0, 1)[:, None]


def _rows_first(blocks: torch.Tensor) -> torch.Tensor:
    """[num_heads_k, g, n, d] -> [n, num_heads_q, d]."""
    return blocks.flatten(0, 1).transpose(0, 1)

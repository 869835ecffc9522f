"""Laws of sampling by the warpers of transformers' generation, in float32; run with transformers 5.23.0.

As generate does, a filter that keeps everything is left out, top-k goes before top-p, and the law is the softmax of
the scores that remain.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from transformers.generation import logits_process

from refgrid_groundtruth import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterable


def top_k_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size], top_k [batch_size] -> the law of samples, float32 as probs."""
    return _laws(probs, top_k.tolist(), [1.0] * len(probs))


def top_p_sampling_from_probs(probs: torch.Tensor, top_p: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size], top_p [batch_size] -> the law of samples, float32 as probs.

    Raises Unavailable("unsupported") for a row whose nucleus ends within tied tokens, of which the warper keeps some,
    and for a top_p below 0.
    """
    return _laws(probs, [0] * len(probs), top_p.tolist())


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size]; top_k, top_p [batch_size] -> the law of samples, float32 as probs.

    Raises Unavailable("unsupported") as top_p_sampling_from_probs.
    """
    return _laws(probs, top_k.tolist(), top_p.tolist())


def _laws(probs: torch.Tensor, top_k: list[int], top_p: list[float]) -> dict[str, torch.Tensor]:
    scores = probs.log()
    for (k, p), rows in _alike(zip(top_k, top_p, strict=True)).items():
        for warper in _warpers(k, p):
            before = scores[rows]
            after = warper(None, before)
            _demand_no_tie(rows, before, after)
            scores[rows] = after
    return {"samples": scores.softmax(dim=-1)}


def _alike(filters: Iterable[tuple[int, float]]) -> dict[tuple[int, float], list[int]]:
    """Rows by their filters: a warper takes one k or p for all rows that it is given."""
    rows: dict[tuple[int, float], list[int]] = defaultdict(list)
    for row, each in enumerate(filters):
        rows[each].append(row)
    return rows


def _warpers(k: int, p: float) -> list[logits_process.LogitsProcessor]:
    if p < 0:
        raise Unavailable("unsupported", f"TopPLogitsWarper refuses a top_p of {p:g}")
    warpers: list[logits_process.LogitsProcessor] = [logits_process.TopKLogitsWarper(k)] if k > 0 else []
    return [*warpers, logits_process.TopPLogitsWarper(p)] if p < 1 else warpers


def _demand_no_tie(rows: list[int], before: torch.Tensor, after: torch.Tensor) -> None:
    kept = after > -torch.inf
    dropped = ~kept & (before > -torch.inf)
    least_kept = before.masked_fill(~kept, torch.inf).amin(dim=-1)
    tied = dropped.any(dim=-1) & (before.masked_fill(~dropped, -torch.inf).amax(dim=-1) == least_kept)
    if tied.any():
        row = rows[int(tied.int().argmax())]
        raise Unavailable("unsupported", f"row {row} is cut through tied tokens, of which the warper keeps some")

"""Laws of sampling by the warpers of transformers' generation, in float32; run with transformers 5.23.0.

As generate does, a filter that keeps everything is left out, top-k goes before top-p, and the law is the softmax of
the scores that remain.
"""

from __future__ import annotations

import torch
from transformers.generation import logits_process

from refgrid_groundtruth import Unavailable


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
    for row, (k, p) in enumerate(zip(top_k, top_p, strict=True)):
        for warper in _warpers(k, p):
            before = scores[row : row + 1]
            after = warper(None, before)
            _demand_no_tie(row, before, after)
            scores[row] = after[0]
    return {"samples": scores.softmax(dim=-1)}


def _warpers(k: int, p: float) -> list[logits_process.LogitsProcessor]:
    if p < 0:
        raise Unavailable("unsupported", f"TopPLogitsWarper refuses a top_p of {p:g}")
    warpers: list[logits_process.LogitsProcessor] = [logits_process.TopKLogitsWarper(k)] if k > 0 else []
    return [*warpers, logits_process.TopPLogitsWarper(p)] if p < 1 else warpers


def _demand_no_tie(row: int, before: torch.Tensor, after: torch.Tensor) -> None:
    kept = after > -torch.inf
    dropped = ~kept & (before > -torch.inf)
    if dropped.any() and before[dropped].max() == before[kept].min():
        raise Unavailable("unsupported", f"row {row} is cut through tied tokens, of which the warper keeps some")

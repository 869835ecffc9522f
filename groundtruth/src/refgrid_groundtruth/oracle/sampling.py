"""Laws of top-k and top-p sampling in float64, row by row, by a full sort."""

from __future__ import annotations

import torch


def top_k_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size], top_k [batch_size] -> the law of samples, float64 as probs."""
    return _laws([_top_k(row, int(k)) for row, k in zip(probs.double(), top_k, strict=True)], probs)


def top_p_sampling_from_probs(probs: torch.Tensor, top_p: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size], top_p [batch_size] -> the law of samples, float64 as probs."""
    return _laws([_top_p(row, float(p)) for row, p in zip(probs.double(), top_p, strict=True)], probs)


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size]; top_k, top_p [batch_size] -> the law of samples, float64 as probs."""
    rows = zip(probs.double(), top_k.tolist(), top_p.tolist(), strict=True)
    return _laws([_top_p(_top_k(row, k), p) for row, k, p in rows], probs)


def _laws(rows: list[torch.Tensor], probs: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"samples": torch.stack(rows) if rows else probs.double()}


def _top_k(row: torch.Tensor, k: int) -> torch.Tensor:
    """A token stays if fewer than k are more probable, so those that tie share their fate."""
    if not 0 < k <= len(row):
        return row / row.sum()
    rising = row.sort().values
    more_probable = len(row) - torch.searchsorted(rising, row, right=True)
    return _only(row, more_probable < k)


def _top_p(row: torch.Tensor, p: float) -> torch.Tensor:
    """A token stays if the mass of those more probable is less than p; the most probable one stays in any case."""
    row = row / row.sum()
    if p >= 1:
        return row
    rising = row.sort().values
    above = torch.cat([rising.flip(0).cumsum(0).flip(0), rising.new_zeros(1)])  # mass from each place upwards
    more_probable = above[torch.searchsorted(rising, row, right=True)]
    return _only(row, (more_probable < p) | (row == rising[-1]))


def _only(row: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    row = row * kept
    return row / row.sum()

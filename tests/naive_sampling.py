"""Sampling as its definition says it, token by token on exact fractions: slow, and written without the package."""

from __future__ import annotations

from fractions import Fraction

import torch


def law(probs: torch.Tensor, top_k: torch.Tensor | None, top_p: torch.Tensor | None) -> torch.Tensor:
    """The probability of each token, [batch_size, vocab_size] float64; a filter that is None is left out."""
    rows = []
    for i, row in enumerate(probs.tolist()):
        p = [Fraction(x) for x in row]
        if top_k is not None:
            p = _top_k(p, int(top_k[i]))
        if top_p is not None:
            p = _top_p(p, Fraction(float(top_p[i])))
        rows.append([float(x) for x in _scaled(p)])
    return torch.tensor(rows, dtype=torch.float64)


def _top_k(p: list[Fraction], k: int) -> list[Fraction]:
    if k < 1 or k > len(p):
        return p
    kth = sorted(p, reverse=True)[k - 1]
    return [x if x >= kth else Fraction(0) for x in p]


def _top_p(p: list[Fraction], bound: Fraction) -> list[Fraction]:
    """From the most probable down, all that tie at once, until the mass so far has reached the bound."""
    if bound >= 1:
        return p
    p, kept, mass = _scaled(p), set[Fraction](), Fraction(0)
    for value in sorted(set(p), reverse=True):
        if kept and mass >= bound:
            break
        kept.add(value)
        mass += value * p.count(value)
    return [x if x in kept else Fraction(0) for x in p]


def _scaled(p: list[Fraction]) -> list[Fraction]:
    total = sum(p)
    return [x / total for x in p]

"""Inputs of sampling: rows of known whole-number weights, and filters that no rounding of a sum can move.

A probability is a whole weight over the exact sum of its row, rounded once, so no maths library changes it. A top_p
lies well within the mass of the token (or of the tied tokens) at which the row's mass reaches it: a library that sums
in float32 cuts there too. Few tokens hold most of the mass of most rows, since then few draws tell two laws apart.

Where a row is cut through tied tokens libraries differ, and for a top_p of 0 one defines nothing. Such rows are only in
workloads whose uuid holds "ties" or "argmax", so that a refusal leaves the others proven. One that holds "close" has
cuts between nearly equal tokens, far apart for a float32, which a sampler of fewer bits does not tell from each other.
One that holds "many" is a row of few tokens, the likeliest of them about one half of it: draws of it are cheap, many,
and tell a law that is a little off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value


class Row(NamedTuple):
    """Weights of a vocabulary, largest first, and the filters; a definition without one of them leaves it out."""

    weights: Callable[[int], torch.Tensor]
    top_k: int
    top_p: float


def halves(vocab_size: int) -> torch.Tensor:
    """Each of 20 tokens half as likely as the one before, the others together 1 in 250 to 1 in 500."""
    return _then_ones([2 ** (25 - i) for i in range(20)], vocab_size)


def steps(vocab_size: int) -> torch.Tensor:
    """100 tokens, the first three times as likely as the last, the others together 1 in 40 to 1 in 80."""
    return _then_ones([1024 * (150 - i) for i in range(100)], vocab_size)


def close(vocab_size: int) -> torch.Tensor:
    """100 tokens, each one thousandth of the first less likely than the one before: fewer bits would tie them."""
    return _then_ones([2**13 * (1000 - i) for i in range(100)], vocab_size)


def gaps(vocab_size: int) -> torch.Tensor:
    """As steps, but half of the vocabulary cannot occur."""
    weights = steps(vocab_size)
    weights[vocab_size - vocab_size // 2 :] = 0
    return weights


def zipf(vocab_size: int) -> torch.Tensor:
    """As words of a language: the token of rank r weighs 2**20 / r, rounded down, so that rare ones tie."""
    return 2**20 // torch.arange(1, vocab_size + 1)


def one_hot(vocab_size: int) -> torch.Tensor:
    """One token alone can occur."""
    weights = torch.zeros(vocab_size, dtype=torch.int64)
    weights[0] = 1
    return weights


def tied(vocab_size: int) -> torch.Tensor:
    """One token twice as likely as each of six others that tie, the rest as rare as in halves."""
    return _then_ones([2**25] + [2**24] * 6, vocab_size)


def flat(vocab_size: int) -> torch.Tensor:
    """All tokens tie."""
    return torch.ones(vocab_size, dtype=torch.int64)


def rows_of(uuid: str, vocab_size: int) -> tuple[Row, ...]:
    """The rows that the batch of a workload goes through in turn."""
    if "ties" in uuid:
        return (
            Row(tied, 3, 0.5),
            Row(zipf, vocab_size, 0.9),
            Row(flat, 50, 0.5),
            Row(steps, 120, 0.99999),
            Row(tied, 0, 0.5),
            Row(gaps, 200, 1.0),
            Row(flat, 1, 1.0),
        )
    if "argmax" in uuid:
        return Row(steps, 50, 0.0), Row(zipf, 0, 0.0), Row(halves, 2, 0.0), Row(one_hot, vocab_size, 0.0)
    if "close" in uuid:  # bfloat16 would let in tokens of 6, 2 and 29 % by top-p, of 4, 1 and 60 % by top-k
        return Row(close, 50, 0.5), Row(close, 99, 0.9), Row(close, 2, 0.12)
    if "many" in uuid:
        return (Row(halves, 12, 0.9),)
    return (
        Row(steps, 50, 0.9),
        Row(halves, 2, 0.8),
        Row(zipf, 0, 1.0),
        Row(one_hot, vocab_size, 0.9),
        Row(halves, vocab_size + 5, 0.5),
        Row(steps, 1, 0.5),
        Row(gaps, vocab_size - 3, 0.9),
        Row(zipf, 50, 1.0),
        Row(steps, 0, 1e-6),
        Row(zipf, -1, 0.3),
        Row(halves, 3, 2.0),
    )


def probs(drawing: Drawing, name: str) -> Value:
    """Each row's weights in an order of its own."""
    batch_size, vocab_size = drawing.shape(name)
    generator = drawing.generator(name)
    drawn = torch.empty(batch_size, vocab_size, dtype=drawing.float_dtype(name))
    laws: dict[Callable[[int], torch.Tensor], torch.Tensor] = {}  # a batch has few, and each is as long as a row
    for i, row in enumerate(_batch(drawing, batch_size, vocab_size)):
        if row.weights not in laws:
            weights = row.weights(vocab_size)
            laws[row.weights] = (weights.double() / int(weights.sum())).to(drawn.dtype)
        order = torch.randperm(vocab_size, generator=generator)
        torch.index_select(laws[row.weights], 0, order, out=drawn[i])
    return drawing.place(name, drawn)


def top_k(drawing: Drawing, name: str) -> Value:
    """Below 1, 1, a few, all, and more than there are."""
    drawn = [row.top_k for row in _batch(drawing, *drawing.known("probs", name).shape)]
    return drawing.place(name, torch.tensor(drawn, dtype=drawing.dtype(name)))


def top_p(drawing: Drawing, name: str) -> Value:
    """As the row says where that is far from what moves the cut, else in the middle of the mass that reaches it."""
    batch_size, vocab_size = drawing.known("probs", name).shape
    filtered = "top_k" in drawing.definition.inputs
    drawn = [inside(row, vocab_size, filtered=filtered) for row in _batch(drawing, batch_size, vocab_size)]
    return drawing.place(name, torch.tensor(drawn, dtype=drawing.dtype(name)))


@cache
def inside(row: Row, vocab_size: int, *, filtered: bool) -> float:
    """The row's top_p, moved to the middle of the mass that reaches it where it lies in an outer quarter of that."""
    if not 0 < row.top_p < 1:
        return row.top_p
    weights = row.weights(vocab_size)
    if filtered and 0 < row.top_k <= vocab_size:
        weights = weights[weights >= weights[row.top_k - 1]]
    values, counts = weights.unique_consecutive(return_counts=True)
    reached = [0, *(values * counts).cumsum(0).tolist()]
    bound = row.top_p * reached[-1]
    at = next(i for i, mass in enumerate(reached) if mass >= bound)
    low, high = reached[at - 1], reached[at]
    quarter = (high - low) / 4
    near = bound > high - quarter or (bound < low + quarter and low > 0)  # nothing rounds a mass of 0
    return float((low + high) / 2 / reached[-1]) if near else row.top_p


def _batch(drawing: Drawing, batch_size: int, vocab_size: int) -> list[Row]:
    """The row of each place of the batch; batches of other sizes begin elsewhere."""
    rows = rows_of(drawing.workload.uuid, vocab_size)
    return [rows[(batch_size + i) % len(rows)] for i in range(batch_size)]


def _then_ones(first: list[int], vocab_size: int) -> torch.Tensor:
    return torch.cat([torch.tensor(first), torch.ones(vocab_size, dtype=torch.int64)])[:vocab_size]

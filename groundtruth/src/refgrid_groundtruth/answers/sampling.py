"""Rows of which one token alone can be drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

# So many rows that a filter which lets a second token through is seen: it holds 5 of 11 parts, and 0.55**60 < 1e-15.
ROWS, VOCAB_SIZE = 60, 16
SIXTEENTHS = (6.0, 5.0, 3.0, 2.0)


def _answer(**filters: tuple[float, ...]) -> Answer:
    """The most probable token stands elsewhere in each row, and the last row has no other; filters go round."""
    first = [7 * row % VOCAB_SIZE for row in range(ROWS)]
    probs = torch.zeros(ROWS, VOCAB_SIZE)
    for row, token in enumerate(first):
        for rank, weight in enumerate(SIXTEENTHS):
            probs[row, (token + 3 * rank) % VOCAB_SIZE] = weight / 16
    probs[-1] = torch.eye(VOCAB_SIZE)[first[-1]]
    given: dict[str, torch.Tensor] = {"probs": probs}
    for name, values in filters.items():
        given[name] = torch.tensor([values[row % len(values)] for row in range(ROWS)])
    return given, {"samples": torch.tensor(first)}


def _top_k_sampling_from_probs() -> Answer:
    """The most probable one; the last row is not filtered."""
    given, expected = _answer(top_k=(1,))
    given["top_k"][-1] = 0
    return {**given, "top_k": given["top_k"].int()}, expected


def _top_p_sampling_from_probs() -> Answer:
    """The first token holds 0.375, which reaches 0.3; the last row is not filtered."""
    given, expected = _answer(top_p=(0.3, 1e-6, 0.36))
    given["top_p"][-1] = 1
    return given, expected


def _top_k_top_p_sampling_from_probs() -> Answer:
    """Of two tokens that are kept the first holds 6 / 11, which reaches 0.5; of all it holds 0.375, which does not."""
    given, expected = _answer(top_k=(2, 1), top_p=(0.5, 0.9))
    return {**given, "top_k": given["top_k"].int()}, expected


CASES: dict[str, Callable[[], Answer]] = {
    "top_k_sampling_from_probs": _top_k_sampling_from_probs,
    "top_p_sampling_from_probs": _top_p_sampling_from_probs,
    "top_k_top_p_sampling_from_probs": _top_k_top_p_sampling_from_probs,
}

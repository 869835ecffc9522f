"""Holds chosen indices against the scores that they were chosen by: which of equal scores is taken is free, and so is
their order.
"""

from __future__ import annotations

import torch

from refgrid.compare import Comparison, ComparisonError, EmptyComparison, compare
from refgrid.tolerance import EXACT, Tolerance


def compare_chosen(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Hold indices [rows, k], -1 for none, against scores [rows, candidates] or against the indices of a kernel.

    Scores are floating, -inf for what is no candidate. A row must hold min(k, candidates) of them, each once, and their
    sorted scores must be the largest ones within the tolerance; so near-equal ones may be taken for each other. Against
    indices, without scores, the sets must be equal. A wrong index has no score, so it disagrees wherever it stands.

    Raises ComparisonError for what is no indices or of other rows, EmptyComparison where there is none.
    """
    _demand_indices(output, actual)
    if expected.ndim != 2 or len(expected) != len(actual) or expected.device != actual.device:
        found = f"{list(expected.shape)} on {expected.device}"
        raise ComparisonError(f"what {output} is held against is {found}, but should be of {len(actual)} rows")
    actual = actual.long()
    if not expected.is_floating_point():
        _demand_indices(output, expected)
        return compare(output, *(each.long().sort(dim=1, descending=True).values for each in (actual, expected)), EXACT)
    scores = expected.double()
    legal = _is_legal(actual, scores)
    if not legal.all():
        return _illegal(output, actual, legal)
    taken = torch.where(actual < 0, -torch.inf, _score(actual, scores)).sort(dim=1, descending=True).values
    best = scores.sort(dim=1, descending=True).values[:, : actual.shape[1]]
    best = torch.nn.functional.pad(best, (0, actual.shape[1] - best.shape[1]), value=-torch.inf)
    return compare(output, taken.float(), best.float(), tolerance)


class ChoiceComparison(Comparison):
    """A comparison that some index has failed for what it is."""

    def describe(self) -> str:
        """Row, place and index, and what an index should be, in one line."""
        worst = self.worst[0]
        return (
            f"{self.output} holds {int(worst.actual)} at {list(worst.index)} but should hold candidates, each once, "
            f"and -1 for none ({100 * self.matched_ratio:.4g}% do)"
        )


def _demand_indices(output: str, indices: torch.Tensor) -> None:
    if indices.ndim != 2 or indices.is_floating_point() or indices.dtype == torch.bool:
        found = f"{str(indices.dtype).removeprefix('torch.')} {list(indices.shape)}"
        raise ComparisonError(f"{output} is {found}, but should be whole numbers [rows, k]")
    if indices.numel() == 0:
        raise EmptyComparison(f"{output} has no element (shape {list(indices.shape)}): nothing was compared")


def _score(index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The score of each index, that of the first candidate for one that is out of range."""
    inside = (index >= 0) & (index < scores.shape[1])
    padded = scores if scores.shape[1] else scores.new_full((len(scores), 1), -torch.inf)
    return padded.gather(1, torch.where(inside, index, 0))


def _is_legal(index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """-1, or a candidate that stands nowhere before in the row."""
    ordered, place = index.sort(dim=1, stable=True)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    again = torch.zeros_like(again).scatter_(1, place, again)
    candidate = (index >= 0) & (index < scores.shape[1]) & (_score(index, scores) > -torch.inf)
    return (index == -1) | (candidate & ~again)


def _illegal(output: str, actual: torch.Tensor, legal: torch.Tensor) -> Comparison:
    """Indices as they are beside -1 where they are wrong, so that the worst are those."""
    wrong = compare(output, actual, torch.where(legal, actual, -2), EXACT)
    return ChoiceComparison(**vars(wrong))

"""Holds chosen indices against the scores that they were chosen by.

Their order is free, and so is which of equal scores is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison, compare, told_rows
from refgrid.proving.explanations import within
from refgrid.proving.tolerance import EXACT, Tolerance


@dataclass(frozen=True)
class ChoiceComparison(Comparison):
    """A comparison of choices that do not match, and which index is wrong.

    `told` is one line, `report` says which rows are red and has a line for each of the worst; both stay here.
    """

    told: str = ""
    report: tuple[str, ...] = ()

    def describe(self) -> str:
        """Row, place, index, what it should be, and the bound, in one line."""
        return f"{self.told} ({self._bound()})"

    def lines(self) -> list[str]:
        """Which rows are red, and the worst indices or scores."""
        return list(self.report)

    def to_dict(self) -> dict[str, Any]:
        """The numbers alone."""
        return {name: value for name, value in super().to_dict().items() if name not in ("told", "report")}


def compare_chosen(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Hold indices [rows, k], -1 for none, against scores [rows, candidates] or against the indices of a kernel.

    Scores are floating, -inf for what is no candidate. A row must hold min(k, candidates) of them at any places, each
    once, and their sorted scores must be the largest ones within the tolerance; so near-equal ones may be taken for
    each other. What is compared, and counted, are those sorted scores, and where some index is illegal, the indices.

    Against indices, the rows must hold the same set, for at least the tolerance's share of the places: without scores a
    tie that was cut otherwise is a mistake like any other, and so is a near-equal score that was rounded otherwise.

    Raises ComparisonError for what is no indices, of other rows or a score of NaN, EmptyComparison where there is none.
    """
    _demand_indices(output, actual)
    if expected.ndim != 2 or len(expected) != len(actual) or expected.device != actual.device:
        found, wanted = ([list(each.shape), str(each.device)] for each in (expected, actual))
        raise ComparisonError(
            f"what {output} is held against is {found[0]} on {found[1]}, "
            f"but should be of {len(actual)} rows on {wanted[1]}"
        )
    actual = actual.long()
    if not expected.is_floating_point():
        _demand_indices(output, expected)
        return _compare_sets(output, actual, expected.long(), tolerance)
    scores = _with_none(expected)
    if scores.isnan().any():
        at = scores.isnan().nonzero()[0].tolist()
        raise ComparisonError(f"the score that {output} is held against is nan at {at}, so nothing tells what is right")
    legal = _is_legal(actual, scores)
    if not legal.all():
        return _illegal(output, actual, legal, scores)
    return _compare_scores(output, actual, scores, tolerance)


def _demand_indices(output: str, indices: torch.Tensor) -> None:
    if indices.ndim != 2 or indices.is_floating_point() or indices.dtype == torch.bool:
        found = f"{str(indices.dtype).removeprefix('torch.')} {list(indices.shape)}"
        raise ComparisonError(f"{output} is {found}, but should be whole numbers [rows, k]")
    if indices.numel() == 0:
        raise EmptyComparison(f"{output} has no element (shape {list(indices.shape)}): nothing was compared")


def scores_at(index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The score [rows, candidates] of each chosen index [rows, k], float64; -inf for -1, which is none."""
    return _scores_of(index.long(), _with_none(scores))


def _with_none(scores: torch.Tensor) -> torch.Tensor:
    """In float64, with a last one for no candidate at all."""
    return torch.nn.functional.pad(scores.double(), (0, 1), value=-torch.inf)


def _is_legal(index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """-1, or a candidate that stands nowhere before in the row."""
    return (index == -1) | ((_scores_of(index, scores) > -torch.inf) & ~_stands_before(index))


def _scores_of(index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """The score of each index, -inf for one that is out of range."""
    nowhere = scores.shape[1] - 1
    return scores.gather(1, torch.where((index >= 0) & (index < nowhere), index, nowhere))


def _stands_before(index: torch.Tensor) -> torch.Tensor:
    """Whether an index stands in its row already; -1 may, and is none."""
    ordered, place = index.sort(dim=1, stable=True)
    again = torch.zeros_like(index, dtype=torch.bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)
    return torch.zeros_like(again).scatter_(1, place, again)


def _illegal(output: str, actual: torch.Tensor, legal: torch.Tensor, scores: torch.Tensor) -> Comparison:
    """Indices as they are beside the next number where they are illegal: so the worst is the first of those."""
    wrong = compare(output, actual, torch.where(legal, actual, actual + 1), EXACT)
    reasons = [_told_illegal(int(each.actual), each.index[0], scores) for each in wrong.worst if each.error]
    worst = [f"is {each.actual} {reason}" for each, reason in zip(wrong.worst, reasons, strict=False)]
    told = f"{output} is {int(wrong.worst[0].actual)} at {list(wrong.worst[0].index)} {reasons[0]}"
    return ChoiceComparison(**vars(wrong), told=told, report=_report(wrong, legal, worst))


def _told_illegal(index: int, row: int, scores: torch.Tensor) -> str:
    end = scores.shape[1] - 1
    if not -1 <= index < end:
        return f"but should be in [0, {end}), or -1 for none"
    if scores[row, index] == -torch.inf:
        return f"but should be a candidate of row {row}, which that is not"
    return "but should stand once in its row"


def _report(found: Comparison, right: torch.Tensor, worst: Sequence[str], place: str = "place") -> tuple[str, ...]:
    """The red rows, and what is told of each of the worst places, by row and place; `right` [rows, places]."""
    red = (~right).any(dim=1).nonzero()[:, 0].tolist()
    wrong = f"{found.output}: {int((~right).sum())} of {right.numel()} {place}s are wrong"
    told = [f"    [row={each.index[0]}, {place}={each.index[1]}] " for each in found.worst]
    lines = [at + what for at, what in zip(told, worst, strict=False)]  # fewer may differ
    return (wrong, f"  red are {len(red)} of {len(right)} rows: {told_rows(red)}", "  the worst:", *lines)


def _compare_scores(output: str, actual: torch.Tensor, scores: torch.Tensor, tolerance: Tolerance) -> Comparison:
    k = actual.shape[1]
    taken = torch.where(actual < 0, -torch.inf, _scores_of(actual, scores)).sort(dim=1, descending=True).values
    best = scores.topk(min(k, scores.shape[1]), dim=1).values  # sorted
    best = torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-torch.inf)
    found = compare(output, taken, best, tolerance)
    if found.matches:
        return found
    row = found.worst[0].index[0]
    told = _told_of_row(output, row, actual[row], scores[row])
    worst = [
        f"is of score {each.actual:.9g} but should be of {each.expected:.9g} (error {each.error:.4g})"
        for each in found.worst
        if each.error
    ]
    right = within(taken, best, tolerance)
    return ChoiceComparison(**vars(found), told=told, report=_report(found, right, worst, "rank"))


def _told_of_row(output: str, row: int, index: torch.Tensor, scores: torch.Tensor) -> str:
    """Which index of a row is wrong: -1 for a candidate, else one that others exceed, else the best that is missing."""
    candidates, named = int((scores > -torch.inf).sum()), index >= 0
    wanted = min(len(index), candidates)
    if int(named.sum()) < wanted:
        place = int((~named).nonzero()[0])
        return f"{output} is -1 at {[row, place]} but should be a candidate: row {row} has {candidates}"
    best = scores.topk(wanted)
    held = torch.where(named, scores[index], torch.inf)  # scores[-1] is that of no candidate
    place = int(held.argmin())
    lowest, least = held[place].item(), best.values[-1].item()
    if lowest < least:
        bound = f"but should be one of at least {least:.9g}"
        return f"{output} is {int(index[place])}, of score {lowest:.9g}, at {[row, place]} {bound}"
    lost = best.indices[~torch.isin(best.indices, index)][0]
    return f"{output} lacks {int(lost)}, of score {scores[lost].item():.9g}, in row {row} but should hold it"


def _compare_sets(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Indices as they are beside the next number where the other side has them not, or not so often."""
    if expected.shape != actual.shape:
        raise ComparisonError(f"{output}.shape = {list(actual.shape)}, but should be {list(expected.shape)}")
    given = expected.sort(dim=1).values
    place = torch.searchsorted(given, actual).clamp(max=given.shape[1] - 1)
    shared = (given.gather(1, place) == actual) & ~_stands_before(actual)
    none = (actual == -1).cumsum(dim=1) <= (expected == -1).sum(dim=1, keepdim=True)
    right = torch.where(actual == -1, none, shared)
    found = compare(output, actual, torch.where(right, actual, actual + 1), tolerance)
    if found.matches:
        return found
    row, place_of_worst = found.worst[0].index
    told = f"{output} is {int(found.worst[0].actual)} at {[row, place_of_worst]}"
    reason = "but should be one of those that the other chose for row"
    worst = [f"is {each.actual} {reason} {each.index[0]}" for each in found.worst if each.error]
    return ChoiceComparison(**vars(found), told=f"{told} {reason} {row}", report=_report(found, right, worst))

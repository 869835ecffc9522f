"""Holds random tokens against the law behind them, or against the tokens that a kernel drew from the same law.

The evidence against a sampler is a likelihood ratio: how much likelier its draws are under a mixture of wrong laws than
under the right one. If the sampler is right, that ratio is 1 on average, so by Markov's inequality it reaches 1 / RATE
in at most a share RATE of all cases, however few the draws and however many the outcomes: no count needs to be large,
no bins are merged, nothing is asymptotic. Each wrong law is put on all rows at once (evidence multiplies) and on one
row at a time (evidence is averaged over the rows).

Wrong laws, held against a law: the right one tempered, so that likely tokens are drawn too often or too seldom, and
Dirichlet distributions about the right one, from far off to so close that only many draws show it. Held against a
kernel's draws: given how often both sides together drew each token, the split between the sides, hypergeometric if the
laws are equal, is replaced by a beta-binomial one.

Power. With n draws of one row over s outcomes equally likely, and a share d of the mass moved from half of them to the
other half (total variation distance d), a wrong sampler is found with probability 0.9 if d is at most 1/2 and

    d >= sqrt((15 + 3 sqrt(s)) / n)    against the law,
    d >= sqrt((25 + 7 sqrt(s)) / n)    against n draws of a kernel, for s up to n.

An outcome of probability q that is never drawn is found by n >= 25 / q draws against the law, whether of one row or of
several that all lack theirs; a temperature of 0.9 in the place of 1 by 6,000 draws of outcomes each half as likely as
the one before. tests/test_draws.py measures all of these. A draw that the law calls impossible is found at once, as is
one out of range. That rows are independent of each other is assumed and not tested.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison, Location, compare
from refgrid.proving.tolerance import EXACT, Tolerance

RATE = 1e-6  # share of the cases of a right sampler that are called wrong, at most

# Elements of the inputs whose tokens are drawn for one case, and the most tokens; the least draws of a row.
_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
_TOKENS = 2**22
_LEAST = 16

_LAW_ERROR = 1e-3  # of a row's sum; a float32 softmax on a CPU is off by 1.7e-4 over 128,256 outcomes

# The wrong laws: exponents, pseudo-counts of a row, and pseudo-counts of a token.
_TEMPERED = (0.5, 0.8, 0.9, 1.1, 1.25, 2.0)
_DIRICHLET = tuple(4.0**i for i in range(-1, 12))
_BETA = tuple(4.0**i for i in range(-1, 9))


class _Tally(NamedTuple):
    """Every token drawn of some row, [tokens] in order of the row, and how often; `draws` is [sides], of each row."""

    row: torch.Tensor
    token: torch.Tensor
    count: torch.Tensor  # [tokens, sides] float64
    draws: tuple[int, ...]


class _Shares(NamedTuple):
    """Shares of the draws, [places]: what was found of a token in its row, and what should be."""

    row: torch.Tensor
    token: torch.Tensor
    actual: torch.Tensor
    expected: torch.Tensor


def draws_for(rows: int, outcomes: int, device: str) -> int:
    """How often to draw each of `rows` rows of `outcomes` inputs: bounded work, but 16 draws or more."""
    elements, rows = _ELEMENTS[device.partition(":")[0]], max(1, rows)
    return max(_LEAST, min(elements // (rows * max(1, outcomes)), _TOKENS // rows))


def compare_draws(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Hold draws [n, rows] against a law [rows, outcomes] of floating numbers or against draws [m, rows].

    No tolerance applies, as the bound follows from RATE: `headroom` is the logarithm of the evidence over that of the
    bound, infinite for an impossible token. `worst` names row and token, the share of draws and what it should be;
    the errors are between these, noise included.

    Raises ComparisonError for what is no draws or no law, EmptyComparison where nothing was drawn.
    """
    del tolerance
    _demand_draws(output, actual)
    if expected.device != actual.device:
        raise ComparisonError(f"{output}.device = {actual.device}, but should be {expected.device}")
    with torch.no_grad():
        if expected.is_floating_point():
            return _against_law(output, actual.long(), _law(output, actual, expected))
        _demand_draws(output, expected)
        if actual.shape[1] != expected.shape[1]:
            raise ComparisonError(f"{output} has {actual.shape[1]} rows, but should have {expected.shape[1]}")
        return _against_draws(output, actual.long(), expected.long())


class DrawsComparison(Comparison):
    """A comparison of shares: `worst` is indexed by row and token."""

    def describe(self) -> str:
        """Row, token, its share of the draws and what that should be, in one line."""
        if self.matches:
            return f"{self.output} match their law ({self._told()})"
        worst = self.worst[0]
        row, token = worst.index
        found = f"is token {token} in {worst.actual:.4g} of the draws of row {row}"
        return f"{self.output} {found} but should be in {worst.expected:.4g} ({self._told()})"

    def _told(self) -> str:
        return f"{self.count} draws, evidence {self.headroom:.3g} of the bound, false alarms below {RATE:g}"


def _demand_draws(output: str, draws: torch.Tensor) -> None:
    if draws.ndim != 2 or draws.is_floating_point() or draws.dtype == torch.bool:
        found = f"{str(draws.dtype).removeprefix('torch.')} {list(draws.shape)}"
        raise ComparisonError(f"{output} is {found}, but should be whole numbers [draws, rows]")
    if draws.numel() == 0:
        raise EmptyComparison(f"{output} has no draw (shape {list(draws.shape)}): nothing was compared")


def _law(output: str, actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The law in float64, its rows scaled to 1."""
    if expected.ndim != 2 or len(expected) != actual.shape[1] or expected.numel() == 0:
        raise ComparisonError(f"law of {output} is {list(expected.shape)}, but should be [{actual.shape[1]}, outcomes]")
    law = expected.double()
    total = law.sum(dim=1, keepdim=True)
    unsound = ~((law >= 0).all(dim=1) & ((total[:, 0] - 1).abs() <= _LAW_ERROR))
    if unsound.any():
        row = int(unsound.nonzero()[0])
        found = f"sums to {total[row].item():.6g} and holds {law[row].min().item():.6g}"
        raise ComparisonError(f"law of {output} in row {row} {found}, but should sum to 1 and hold nothing below 0")
    return law / total


def _against_law(output: str, actual: torch.Tensor, law: torch.Tensor) -> Comparison:
    outcomes = law.shape[1]
    p = law.gather(1, actual.t().clamp(0, outcomes - 1)).t()
    possible = (p > 0) & (actual >= 0) & (actual < outcomes)
    if not possible.all():
        return _impossible(output, actual, possible)
    tally = _tally(actual)
    evidence = _evidence_of_law(tally, law)
    row = _suspect(evidence)
    here = tally.row == row
    share = torch.zeros_like(law[row])
    share[tally.token[here]] = tally.count[here, 0] / tally.draws[0]
    token = torch.arange(outcomes, device=law.device)
    return _judged(output, evidence, _Shares(torch.full_like(token, row), token, share, law[row]), actual.numel())


def _against_draws(output: str, actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
    if (expected < 0).any():
        raise ComparisonError(f"law of {output} was drawn as {int(expected.min())}, but should be 0 or more")
    if (actual < 0).any():
        return _impossible(output, actual, actual >= 0)
    tally = _tally(actual, expected)
    evidence = _evidence_of_draws(tally)
    row = _suspect(evidence)
    here = tally.row == row
    shares = tally.count[here] / torch.tensor(tally.draws, device=actual.device)
    return _judged(output, evidence, _Shares(tally.row[here], tally.token[here], *shares.unbind(1)), actual.numel())


def _tally(*sides: torch.Tensor) -> _Tally:
    """Draws [n, rows] of each side, counted."""
    tokens, place = torch.cat(sides).unique(return_inverse=True)
    rows = place.shape[1]
    key = place + torch.arange(rows, device=place.device) * len(tokens)
    keys, place = key.unique(return_inverse=True)
    draws = tuple(map(len, sides))
    counts = [part.flatten().bincount(minlength=len(keys)) for part in place.split(draws)]
    return _Tally(keys // len(tokens), tokens[keys % len(tokens)], torch.stack(counts, dim=1).double(), draws)


def _evidence_of_law(tally: _Tally, law: torch.Tensor) -> torch.Tensor:
    """Log-likelihood of each wrong law less that of the right one, [wrong laws, rows]."""
    n, count = tally.draws[0], tally.count[:, 0]
    p = law[tally.row, tally.token]
    right = _by_row(count * p.log(), tally, len(law))
    found = []
    for exponent in _TEMPERED:
        found.append((exponent - 1) * right - n * law.pow(exponent).sum(dim=1).log())
    for pseudo in _DIRICHLET:
        drawn = _by_row(torch.lgamma(pseudo * p + count) - torch.lgamma(pseudo * p), tally, len(law))
        found.append(drawn + math.lgamma(pseudo) - math.lgamma(pseudo + n) - right)
    return torch.stack(found)


def _evidence_of_draws(tally: _Tally) -> torch.Tensor:
    """As _evidence_of_law, given how often both sides together drew each token: [wrong laws, rows].

    Row by row and rare tokens first, so that the last token, which the others leave no choice, is the most telling
    one no more than it must be.
    """
    rows, both = int(tally.row[-1]) + 1, tally.count.sum(dim=1)
    order = (tally.row * (both.max() + 1) + both).argsort(stable=True)
    row, mine, both = tally.row[order], tally.count[order, 0], both[order]
    n, total = tally.draws[0], sum(tally.draws)
    left = n - (mine.cumsum(0) - mine - row * n)  # of this side, with this token and those after it
    all_left = total - (both.cumsum(0) - both - row * total)
    open_ = (left > 0) & (left < all_left) & (both < all_left)
    row, mine, both, left, all_left = (each[open_] for each in (row, mine, both, left, all_left))
    right = _choose(all_left - both, left - mine) - _choose(all_left, left)
    found = []
    for pseudo in _BETA:
        a, b = pseudo * left / all_left, pseudo * (1 - left / all_left)
        wrong = _log_beta(mine + a, both - mine + b) - _log_beta(a, b)
        found.append(right.new_zeros(rows).index_add(0, row, wrong - right))
    return torch.stack(found)


def _by_row(values: torch.Tensor, tally: _Tally, rows: int) -> torch.Tensor:
    return values.new_zeros(rows).index_add(0, tally.row, values)


def _choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


def _log_mean(evidence: torch.Tensor) -> float:
    """The logarithm of the mixture of all wrong laws, each in all rows at once and in one row at a time."""
    laws, rows = evidence.shape
    one = evidence.logsumexp(dim=1) - math.log(rows)
    return float(torch.cat([evidence.sum(dim=1), one]).logsumexp(0)) - math.log(2 * laws)


def _suspect(evidence: torch.Tensor) -> int:
    """The row that speaks most against the sampler."""
    return int(evidence.amax(dim=0).argmax())


def _impossible(output: str, actual: torch.Tensor, possible: torch.Tensor) -> Comparison:
    draw, row = (~possible).nonzero().unbind(1)
    (row, token), times = torch.stack([row, actual[draw, row]]).unique(dim=1, return_counts=True)
    share = times.double() / len(actual)
    return _comparison(output, _Shares(row, token, share, torch.zeros_like(share)), actual.numel(), math.inf)


def _judged(output: str, evidence: torch.Tensor, shares: _Shares, count: int) -> Comparison:
    return _comparison(output, shares, count, max(0.0, _log_mean(evidence)) / -math.log(RATE))


def _comparison(output: str, shares: _Shares, count: int, headroom: float) -> Comparison:
    """The measures of the shares; the verdict is the evidence's."""
    found = compare(output, shares.actual, shares.expected, EXACT)
    distance = 0.5 * float((shares.actual - shares.expected).abs().sum())
    places = [int(worst.index[0]) for worst in found.worst]
    indices = torch.stack([shares.row[places], shares.token[places]], dim=1).tolist()
    worst = tuple(
        Location(tuple(index), each.actual, each.expected, each.error)
        for index, each in zip(indices, found.worst, strict=True)
    )
    measures = {
        **vars(found),
        "count": count,
        "matched_ratio": 1.0 if headroom < 1 else min(max(0.0, 1 - distance), 1 - 1e-9),
        "headroom": headroom,
        "worst": worst,
    }
    return DrawsComparison(**measures)

"""Holds random tokens against the law behind them, or against the tokens that a kernel drew from the same law.

A draw that the law calls impossible is found at once, as is one out of range, so a row of one outcome must give exactly
that one. What is possible follows from the op: tokens that tie with the last one that a filter keeps are kept, and a
source that cuts through ties says that it cannot serve. Whether possible tokens come as often as they should is told by
a likelihood ratio, whose false alarms are bounded without any approximation: see refgrid.proving.likelihood.

Power. Each comparison tells what its own draws would find (`Evidence.found`). Besides, with n draws of one row over s
outcomes equally likely, and a share d of the mass moved from half of them to the other half (total variation distance
d), a wrong sampler is found with probability 0.9 if d is at most 1/2 and

    d >= sqrt((17 + 3 sqrt(s)) / n)      against the law,
    d >= sqrt((27 + 7.5 sqrt(s)) / n)    against n draws of a kernel, for s up to n.

An outcome of probability q that is never drawn is found by n >= 27 / q draws against the law, whether of one row or of
several that all lack theirs; a temperature of 0.9 in the place of 1 by 6,000 draws of outcomes each half as likely as
the one before. tests/test_draws.py measures all of these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison, Location, compare, told_rows
from refgrid.proving.likelihood import (
    BOUND,
    Evidence,
    evidence_of_draws,
    evidence_of_law,
    found_against_draws,
    found_against_law,
    mixed,
    right_law,
    tally,
)
from refgrid.proving.tolerance import EXACT, Tolerance

# Elements of the inputs whose tokens are drawn for one case, and the most tokens; the least draws of a row.
_ELEMENTS = {"cpu": 2**23, "cuda": 2**27}
_TOKENS = 2**22
_LEAST = 16
_LEAST_IN_ALL = 64  # of all rows: fewer cannot show that a sampler is deaf to seeds

LAW_ERROR = 1e-3  # of a sum and of each number; a float32 softmax on a CPU is off by 1.7e-4 over 128,256 outcomes


class _Shares(NamedTuple):
    """Shares of the draws, [places]: what was found of a token in its row, and what should be."""

    row: torch.Tensor
    token: torch.Tensor
    actual: torch.Tensor
    expected: torch.Tensor


def draws_for(rows: int, outcomes: int, device: str) -> int:
    """How often to draw each of `rows` rows of `outcomes` inputs: bounded work, but 16 draws or more, and 64 in all."""
    elements, rows = _ELEMENTS[device.partition(":")[0]], max(1, rows)
    return max(_LEAST, _LEAST_IN_ALL // rows, min(elements // (rows * max(1, outcomes)), _TOKENS // rows))


def compare_draws(output: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Comparison:
    """Hold draws [n, rows] against a law [rows, outcomes] of floating numbers or against draws [m, rows].

    No tolerance applies, as the bound follows from the rate of false alarms: `headroom` is the evidence over its bound,
    both as logarithms, infinite for an impossible token. `worst` names row and token, the share of draws and what it
    should be; the errors are between these, noise included.

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


@dataclass(frozen=True, kw_only=True)
class DrawsComparison(Comparison):
    """A comparison of shares: `worst` is indexed by row and token, and the verdict is that of the `evidence`.

    `red` are the rows that would be red if they were the only one.
    """

    evidence: Evidence
    red: tuple[int, ...] = ()

    def describe(self) -> str:
        """Row, token, its share of the draws and what that should be, in one line."""
        if self.matches:
            return f"{self.output} match their law ({self._told()})"
        worst = self.worst[0]
        row, token = worst.index
        found = f"is token {token} in {worst.actual:.4g} of the draws of row {row}"
        return f"{self.output} {found} but should be in {worst.expected:.4g} ({self._told()})"

    def lines(self) -> list[str]:
        """How many draws, which rows are red, and the tokens of the worst row with both shares."""
        told, row = self.evidence, self.worst[0].index[0]
        draws = " against ".join(map(str, told.draws))
        found = f"{self.output}: {draws} draws of each of {told.rows} rows, "
        found += f"evidence {told.nats:.3g} nats, allowed are {told.bound:.3g}"
        return [found, f"  {self._told_red()}", f"  the worst, of row {row}:", *self._told_worst()]

    def _told_red(self) -> str:
        if not self.red:
            return "no row is red by itself, all of them together are"
        return f"red by themselves are {len(self.red)} of {self.evidence.rows} rows: {told_rows(self.red)}"

    def _told_worst(self) -> Iterator[str]:
        for worst in filter(lambda each: each.error != 0, self.worst):  # fewer may differ
            share = f"is {worst.actual:.4g} of the draws but should be {worst.expected:.4g}"
            yield f"    [row={worst.index[0]}, token={worst.index[1]}] {share} (error {worst.error:.4g})"

    def _told(self) -> str:
        told = self.evidence
        draws = " against ".join(map(str, told.draws))
        found = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in told.found.items())
        power = f"; finds {found} with probability {told.power:g}" if found else ""
        nats = f"evidence {told.nats:.3g} of {told.bound:.3g} nats"
        return f"{draws} draws of {told.rows} rows, {nats}, false alarms below {told.rate:g} a case{power}"


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
    unsound = ~((law >= 0).all(dim=1) & ((total[:, 0] - 1).abs() <= LAW_ERROR))
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
    counted = tally(actual)
    right = right_law(law)
    evidence = evidence_of_law(counted, right)
    row = _suspect(evidence)
    here = counted.row == row
    share = torch.zeros_like(law[row])
    share[counted.token[here]] = counted.count[here, 0] / counted.draws[0]
    token = torch.arange(outcomes, device=law.device)
    shares = _Shares(torch.full_like(token, row), token, share, law[row])
    found = found_against_law(right, counted.draws[0])
    whole = Evidence(mixed(evidence), counted.draws, len(law), found=found)
    return _comparison(output, shares, whole, _red(evidence))


def _against_draws(output: str, actual: torch.Tensor, expected: torch.Tensor) -> Comparison:
    if (expected < 0).any():
        raise ComparisonError(f"law of {output} was drawn as {int(expected.min())}, but should be 0 or more")
    if (actual < 0).any():
        return _impossible(output, actual, actual >= 0)
    counted = tally(actual, expected)
    evidence = evidence_of_draws(counted)
    here = counted.row == _suspect(evidence)
    share = counted.count[here] / torch.tensor(counted.draws, device=actual.device)
    shares = _Shares(counted.row[here], counted.token[here], *share.unbind(1))
    found = found_against_draws(counted)
    whole = Evidence(mixed(evidence), counted.draws, actual.shape[1], found=found)
    return _comparison(output, shares, whole, _red(evidence))


def _suspect(evidence: torch.Tensor) -> int:
    """The row that speaks most against the sampler."""
    return int(evidence.amax(dim=0).argmax())


def _red(evidence: torch.Tensor) -> tuple[int, ...]:
    """The rows whose draws alone pass the bound."""
    alone = evidence.logsumexp(dim=0) - math.log(len(evidence))
    return tuple((alone >= BOUND).nonzero()[:, 0].tolist())


def _impossible(output: str, actual: torch.Tensor, possible: torch.Tensor) -> Comparison:
    draw, row = (~possible).nonzero().unbind(1)
    (row, token), times = torch.stack([row, actual[draw, row]]).unique(dim=1, return_counts=True)
    share = times.double() / len(actual)
    certain = Evidence(math.inf, (len(actual),), actual.shape[1])
    red = tuple(row.unique().tolist())
    return _comparison(output, _Shares(row, token, share, torch.zeros_like(share)), certain, red)


def _comparison(output: str, shares: _Shares, evidence: Evidence, red: tuple[int, ...]) -> Comparison:
    """The measures of the shares; the verdict is the evidence's."""
    found = compare(output, shares.actual, shares.expected, EXACT)
    distance = 0.5 * float((shares.actual - shares.expected).abs().sum())
    places = [int(worst.index[0]) for worst in found.worst]
    indices = torch.stack([shares.row[places], shares.token[places]], dim=1).tolist()
    worst = tuple(
        Location(tuple(index), each.actual, each.expected, each.error)
        for index, each in zip(indices, found.worst, strict=True)
    )
    headroom = max(0.0, evidence.nats) / evidence.bound
    measures = {
        **vars(found),
        "count": evidence.draws[0] * evidence.rows,
        "matched_ratio": 1.0 if headroom < 1 else min(max(0.0, 1 - distance), 1 - 1e-9),
        "headroom": headroom,
        "worst": worst,
    }
    return DrawsComparison(**measures, evidence=evidence, red=red)

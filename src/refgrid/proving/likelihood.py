"""How much likelier draws are under wrong laws than under the right one, and which wrong laws are found by that.

The evidence against a sampler is a likelihood ratio: how much likelier its draws are under a mixture of wrong laws than
under the right one. If the sampler is right, that ratio is 1 on average, so by Markov's inequality it reaches 1 / rate
in at most a share `rate` of all cases, however few the draws and however many the outcomes: no count needs to be large,
no bins are merged, nothing is asymptotic. Each wrong law is put on all rows at once (evidence multiplies) and on one
row at a time (evidence is averaged over the rows). That rows are independent of each other is assumed and not tested.

Wrong laws, held against a law: the right one at other temperatures; the right one with its likeliest token drawn too
often; and Dirichlet distributions about the right one, from far off to so close that only many draws show it. Held
against a kernel's draws: given how often both sides together drew each token, the split between the sides,
hypergeometric if the laws are equal, is replaced by a beta-binomial one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

RATE = 1e-6  # share of the cases of a right sampler that are called wrong, at most
COMPARISONS = 4  # of draws that one case makes at most: each may raise a false alarm
BOUND = math.log(COMPARISONS / RATE)
POWER = 0.9  # probability with which a wrong sampler is found where this module says that it is

# The wrong laws: reciprocal temperatures, factors of the likeliest token, pseudo-counts of a row, and of a token.
_TEMPERED = (0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 2.0)
_FAVOURED = (1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
_DIRICHLET = tuple(4.0**i for i in range(-1, 12))
_BETA = tuple(4.0**i for i in range(-1, 9))
_OF_LAW = len(_TEMPERED) + len(_FAVOURED) + len(_DIRICHLET)


class Tally(NamedTuple):
    """Every token drawn of some row, [tokens] in order of the row, and how often; `draws` is [sides], of each row."""

    row: torch.Tensor
    token: torch.Tensor
    count: torch.Tensor  # [tokens, sides] float64
    draws: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """What a verdict on draws rests on.

    `nats` is the logarithm of the likelihood ratio and `bound` what it must stay below; `draws` are those of each row,
    a number a side. False alarms are a share `rate` of cases at most. `found` says what is found with a probability of
    `power` or more at these draws and this law: the nearest `temperature_above` and `temperature_below` 1, the least
    factor of each row's likeliest token, `likeliest_times`, or, where no law is known, a `distance` in total variation;
    what is left out cannot be told from right.
    """

    nats: float
    draws: tuple[int, ...]
    rows: int
    bound: float = BOUND
    rate: float = RATE
    power: float = POWER
    found: Mapping[str, float] = field(default_factory=dict)


def tally(*sides: torch.Tensor) -> Tally:
    """Draws [n, rows] of each side, counted."""
    tokens, place = torch.cat(sides).unique(return_inverse=True)
    rows = place.shape[1]
    key = place + torch.arange(rows, device=place.device) * len(tokens)
    keys, place = key.unique(return_inverse=True)
    draws = tuple(map(len, sides))
    counts = [part.flatten().bincount(minlength=len(keys)) for part in place.split(draws)]
    return Tally(keys // len(tokens), tokens[keys % len(tokens)], torch.stack(counts, dim=1).double(), draws)


class Right(NamedTuple):
    """What the right law [rows, outcomes] gives to all that is asked of it, so that it is gone through once.

    `tempered` [tempered laws, 3, rows] sums the powers of the probabilities, times their logarithms to the power of 0,
    1 and 2; `top` and `likeliest` [rows] are the largest probability and its token.
    """

    law: torch.Tensor
    tempered: torch.Tensor
    top: torch.Tensor
    likeliest: torch.Tensor


def right_law(law: torch.Tensor) -> Right:
    """A law [rows, outcomes] float64, its rows scaled to 1, and what follows from it."""
    exponents = torch.tensor(_TEMPERED, dtype=law.dtype, device=law.device)
    sums = []
    for row in law:
        log = row[row > 0].log()
        powers = torch.exp(exponents[:, None] * log)
        sums.append(powers @ torch.stack([torch.ones_like(log), log, log.square()], dim=1))
    return Right(law, torch.stack(sums, dim=2), *law.max(dim=1))


def evidence_of_law(counted: Tally, right: Right) -> torch.Tensor:
    """Log-likelihood of each wrong law less that of the right one, [wrong laws, rows]."""
    n, count, rows = counted.draws[0], counted.count[:, 0], len(right.law)
    p = right.law[counted.row, counted.token]
    of_right = _by_row(count * p.log(), counted, rows)
    found = [
        (exponent - 1) * of_right - n * sums[0].log() for exponent, sums in zip(_TEMPERED, right.tempered, strict=True)
    ]
    often = _by_row(count * (counted.token == right.likeliest[counted.row]), counted, rows)
    found += [often * math.log(factor) - n * torch.log1p((factor - 1) * right.top) for factor in _FAVOURED]
    for pseudo in _DIRICHLET:
        drawn = _by_row(torch.lgamma(pseudo * p + count) - torch.lgamma(pseudo * p), counted, rows)
        found.append(drawn + math.lgamma(pseudo) - math.lgamma(pseudo + n) - of_right)
    return torch.stack(found)


def evidence_of_draws(counted: Tally) -> torch.Tensor:
    """As evidence_of_law, given how often both sides together drew each token: [wrong laws, rows].

    Row by row and rare tokens first, so that the last token, which the others leave no choice, is the most telling
    one no more than it must be.
    """
    rows, both = int(counted.row[-1]) + 1, counted.count.sum(dim=1)
    order = (counted.row * (both.max() + 1) + both).argsort(stable=True)
    row, mine, both = counted.row[order], counted.count[order, 0], both[order]
    n, total = counted.draws[0], sum(counted.draws)
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


def mixed(evidence: torch.Tensor) -> float:
    """The logarithm of the mixture of all wrong laws, each in all rows at once and in one row at a time."""
    laws, rows = evidence.shape
    one = evidence.logsumexp(dim=1) - math.log(rows)
    return float(torch.cat([evidence.sum(dim=1), one]).logsumexp(0)) - math.log(2 * laws)


def found_against_law(right: Right, n: int) -> dict[str, float]:
    """What n draws of each row find, see Evidence.

    A wrong law's own share of the mixture is a sum over the draws, so that its mean and variance under that very law
    are known. If it exceeds what makes the mixture pass the bound by three standard deviations, Cantelli's inequality
    gives a probability of 0.9 or more; the rest of the mixture only adds to it.
    """
    tempered = zip(_TEMPERED, right.tempered, strict=True)
    exponents = [each for each, sums in tempered if _is_found(_tempered(sums, each), n)]
    factors = [each for each in _FAVOURED if _is_found(_favoured(right.top, each), n)]
    found = {
        "temperature_above": min((1 / each for each in exponents if each < 1), default=None),
        "temperature_below": max((1 / each for each in exponents if each > 1), default=None),
        "likeliest_times": min(factors, default=None),
    }
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def found_against_draws(counted: Tally) -> dict[str, float]:
    """The distance that tests/test_draws.py measured for as many equally likely outcomes as the richest row drew."""
    outcomes = int(counted.row.bincount().max())
    distance = math.sqrt((27 + 7.5 * math.sqrt(outcomes)) / min(counted.draws))
    return {"distance": round(distance, 4)} if distance <= 0.5 else {}


_Moments = tuple[torch.Tensor, torch.Tensor]


def _is_found(moments: _Moments, n: int) -> bool:
    """Mean and variance [rows] of what one draw of each row adds to the evidence, under the wrong law."""
    mean, variance = (n * float(each.sum()) for each in moments)
    return mean - BOUND - math.log(2 * _OF_LAW) >= math.sqrt(POWER / (1 - POWER) * max(0.0, variance))


def _tempered(sums: torch.Tensor, exponent: float) -> _Moments:
    total, first, second = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    return (exponent - 1) * first - total.log(), (exponent - 1) ** 2 * (second - first.square())


def _favoured(top: torch.Tensor, factor: float) -> _Moments:
    total = 1 + (factor - 1) * top
    q = factor * top / total
    return q * math.log(factor) - total.log(), q * (1 - q) * math.log(factor) ** 2


def _by_row(values: torch.Tensor, counted: Tally, rows: int) -> torch.Tensor:
    return values.new_zeros(rows).index_add(0, counted.row, values)


def _choose(n: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


def _log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)

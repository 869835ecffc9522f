"""Measures the test of random tokens itself: cases drawn from the right law, and from laws that it says it finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

from refgrid.calibration.alarms import LEVELS
from refgrid.calibration.chosen import axes_of
from refgrid.calibration.measure import percentiles
from refgrid.dataset.case import Case, Selection, plan
from refgrid.dataset.definition import DataSet
from refgrid.environments.measured import Environment
from refgrid.proving.draws import draws_for
from refgrid.proving.forms import drawn_outputs
from refgrid.proving.likelihood import (
    BOUND,
    POWER,
    RATE,
    evidence_of_draws,
    evidence_of_law,
    found_against_draws,
    found_against_law,
    mixed,
    right_law,
    tally,
)
from refgrid.proving.workbench import Workbench
from refgrid.records.record import now
from refgrid.sources import Sources

SEEDS, CASES_A_SEED = 500, 10
SEEDS_OF_FAULT = 100


class Law(NamedTuple):
    """A law [rows, outcomes] of one workload of an op, without what no row can draw, and the draws of each row."""

    op: str
    case: str
    law: torch.Tensor
    draws: int


Nats = Callable[..., float]  # of the draws of a case, a tensor a side


def measured(dataset: DataSet, environment: Environment) -> dict[str, Any]:
    """As data: of each law and of both tests, how often p-values are small, and faults found."""
    found = [row for law in laws(dataset) for row in (_against_law(law), _against_draws(law))]
    head = {"environment": asdict(environment), "date": now(), "seeds": SEEDS, "cases_a_seed": CASES_A_SEED}
    return {**head, "bound": BOUND, "rate": RATE, "power": POWER, "measured": found}


def random_ops(dataset: DataSet, sources: Sources) -> tuple[str, ...]:
    """The ops of random outputs."""
    cases = plan(dataset, {op: sources.serving(op) for op in sources.ops}, Selection(sizes=("small",)))
    drawn = (case.op for case in cases if drawn_outputs(case.op, dataset.definitions[case.definition]))
    return tuple(dict.fromkeys(drawn))


def laws(dataset: DataSet) -> Iterator[Law]:
    """Of each op the small workload of which a CPU draws each row most often, and the largest of many rows."""
    sources = Sources()
    bench = Workbench(dataset, sources, "cpu")
    for op in random_ops(dataset, sources):
        sized = [(case, axes_of(dataset, case)) for case in _cases(dataset, sources, op)]
        by_draws = max(sized, key=lambda each: _draws(each[1]))
        by_rows = max(sized, key=lambda each: (each[1]["batch_size"], -each[1]["vocab_size"]))
        for case, axes in (by_draws, by_rows):
            laid = bench.lay(case)
            (output,) = drawn_outputs(op, laid.definition)
            law = bench.referee(laid)[output].double()
            yield Law(op, case.name.removesuffix("-shape"), law[:, (law > 0).any(dim=0)], _draws(axes))


def _cases(dataset: DataSet, sources: Sources, op: str) -> list[Case]:
    planned = plan(dataset, {op: sources.serving(op)}, Selection(sizes=("small",)))
    return [case for case in planned if case.op == op and case.check == "shape"]


def _draws(axes: Mapping[str, int]) -> int:
    return draws_for(axes["batch_size"], axes["vocab_size"], "cpu")


def _against_law(given: Law) -> dict[str, Any]:
    right = right_law(given.law)
    stated = found_against_law(right, given.draws)
    return _measured(given, "law", stated, (), lambda actual: mixed(evidence_of_law(tally(actual), right)))


def _against_draws(given: Law) -> dict[str, Any]:
    two = (next(_drawn(given.law, given.draws, seed)) for seed in (0, SEEDS))
    stated = found_against_draws(tally(*two))
    return _measured(given, "draws", stated, (given.law,), lambda *sides: mixed(evidence_of_draws(tally(*sides))))


def _measured(
    given: Law, against: str, stated: Mapping[str, float], others: tuple[torch.Tensor, ...], nats: Nats
) -> dict[str, Any]:
    """`others` are the laws of the other side, none where that is the law itself."""
    found = _nats((given.law, *others), given.draws, SEEDS, nats)
    at_most = {f"{level:g}": sum(each >= -math.log(level) for each in found) for level in LEVELS}
    return {
        "op": given.op,
        "law": given.case,
        "against": against,
        "draws": given.draws,
        "rows": len(given.law),
        "outcomes": int((given.law > 0).sum(dim=1).max()),
        "cases": len(found),
        "nats": percentiles(found),
        "at_most": at_most,
        "red": sum(each >= BOUND for each in found),
        "found": [
            _found(name, by, _nats((_FAULTS[name](given.law, by), *others), given.draws, SEEDS_OF_FAULT, nats))
            for name, by in stated.items()
        ],
    }


def _found(fault: str, by: float, nats: list[float]) -> dict[str, Any]:
    red = sum(each >= BOUND for each in nats)
    return {"fault": fault, "by": by, "cases": len(nats), "found": red, "nats": percentiles(nats)}


def _nats(laws: tuple[torch.Tensor, ...], draws: int, seeds: int, nats: Nats) -> list[float]:
    """Of each case the evidence against draws of the first law, beside those of another; sides have other seeds."""
    found: list[float] = []
    for seed in range(seeds):
        sides = (_drawn(law, draws, seed + side * SEEDS) for side, law in enumerate(laws))
        found += [nats(*case) for case in zip(*sides, strict=True)]
    return found


def _drawn(law: torch.Tensor, draws: int, seed: int) -> Iterator[torch.Tensor]:
    """Cases of one seed, [draws, rows] each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.multinomial(law, draws * CASES_A_SEED, replacement=True, generator=generator)
    return iter(tokens.T.split(draws))


def _tempered(law: torch.Tensor, temperature: float) -> torch.Tensor:
    return _scaled(law.pow(1 / temperature))


def _favoured(law: torch.Tensor, factor: float) -> torch.Tensor:
    return _scaled(law.scatter(1, law.argmax(dim=1, keepdim=True), law.amax(dim=1, keepdim=True) * factor))


def _moved(law: torch.Tensor, distance: float) -> torch.Tensor:
    """So much mass moved from every second outcome, the likeliest first, to the others."""
    order = law.argsort(dim=1, descending=True)
    first = torch.zeros_like(law, dtype=torch.bool).scatter_(1, order[:, ::2], True)
    mass = (law * first).sum(dim=1, keepdim=True)
    return law * torch.where(first, 1 - distance / mass, 1 + distance / (1 - mass))


def _scaled(weights: torch.Tensor) -> torch.Tensor:
    return weights / weights.sum(dim=1, keepdim=True)


_FAULTS: Mapping[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "temperature_above": _tempered,
    "temperature_below": _tempered,
    "likeliest_times": _favoured,
    "distance": _moved,
}

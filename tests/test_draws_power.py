"""What the draws of a small workload on a CPU find: of every sampling op, laws that are a little off."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest
import torch

from refgrid.dataset.case import Case, Selection, op_of, plan
from refgrid.dataset.definition import load_dataset
from refgrid.proving import draws, likelihood
from refgrid.proving.forms import form_of
from refgrid.proving.proof import Prover
from refgrid.sources import Sources

DATASET, SOURCES = load_dataset(Path(__file__).parents[1]), Sources()
OPS = [op for op in SOURCES.ops if (form := form_of(op, "samples")) is not None and form.drawn]
WANTED = ("temperature of 0.8", "temperature of 1.25", "likeliest token 1.25 times")
POWER, CASES = 0.99, 4_000


def wrong(law: torch.Tensor, fault: str) -> torch.Tensor:
    """The law [rows, outcomes] with a fault."""
    if fault.startswith("temperature"):
        weights = law.pow(1 / float(fault.rsplit(maxsplit=1)[-1]))
    else:
        weights = torch.where(law == law.amax(dim=1, keepdim=True), 1.25 * law, law)
    return weights / weights.sum(dim=1, keepdim=True)


def counts(law: torch.Tensor, n: int) -> torch.Tensor:
    """How often n draws give each token, [cases, tokens]: token by token, of what the ones before have left."""
    left, generator = torch.full((CASES,), float(n), dtype=torch.float64), torch.Generator().manual_seed(0)
    found = []
    for share in law / law.flip(0).cumsum(0).flip(0):
        found.append(torch.binomial(left, share.clamp(max=1).expand(CASES), generator=generator))
        left = left - found[-1]
    return torch.stack(found, dim=1)


def power(law: torch.Tensor, n: int, fault: str) -> float:
    """The share of cases, of n draws of one row each, in which a sampler of the wrong law is red."""
    kept = law[:, law[0] > 0]
    count = counts(wrong(kept, fault)[0], n)
    place = torch.arange(count.numel())
    row, token = place // count.shape[1], place % count.shape[1]
    counted = likelihood.Tally(row, token, count.reshape(-1, 1).double(), (n,))
    one = likelihood.right_law(kept)
    of_row = (one.top.expand(CASES), one.likeliest.expand(CASES))
    right = likelihood.Right(kept.expand(CASES, -1), one.tempered.expand(-1, -1, CASES), *of_row)
    evidence = likelihood.evidence_of_law(counted, right)
    nats = evidence.logsumexp(dim=0) - math.log(len(evidence))
    return float((nats >= likelihood.BOUND).double().mean())


@cache
def law_of_most_draws(op: str) -> tuple[torch.Tensor, int]:
    """Of an op's small workloads, the law of the one whose rows are drawn most often on a CPU, and how often."""
    serving = {each: SOURCES.serving(each) for each in SOURCES.ops}
    cases = [
        case
        for case in plan(DATASET, serving, Selection(op_types=("sampling",), sizes=("small",)))
        if case.op == op and case.source == "oracle"
    ]

    def times(case: Case) -> int:
        definition = DATASET.definitions[case.definition]
        workload = next(each for each in DATASET.workloads[case.definition] if each.uuid == case.workload)
        axes = definition.axis_values(workload.axes)
        return draws.draws_for(axes["batch_size"], axes["vocab_size"], "cpu")

    best = max(cases, key=times)
    bench = Prover(DATASET, SOURCES, "cpu").bench
    return bench.truth(bench.lay(best), best, "oracle")["samples"].double(), times(best)


def test_every_op_of_random_tokens_is_among_them() -> None:
    ops = {op_of(each, SOURCES.ops) for each in DATASET.definitions.values() if each.op_type == "sampling"}

    assert set(OPS) == ops != set()


@pytest.mark.parametrize("fault", WANTED)
@pytest.mark.parametrize("op", OPS)
def test_a_small_workload_finds_what_is_a_little_off(op: str, fault: str) -> None:
    law, n = law_of_most_draws(op)

    assert len(law) == 1
    assert power(law, n, fault) >= POWER


@pytest.mark.parametrize("op", OPS)
def test_its_record_says_so(op: str) -> None:
    law, n = law_of_most_draws(op)
    found = likelihood.found_against_law(likelihood.right_law(law), n)

    assert found == {"temperature_above": 1.25, "temperature_below": 0.8, "likeliest_times": 1.25}


def test_fewer_draws_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draws, "_ELEMENTS", {"cpu": draws._ELEMENTS["cpu"] // 2})
    law, n = law_of_most_draws.__wrapped__(OPS[0])

    assert power(law, n, WANTED[-1]) < POWER

"""Every mutant of the table at its own small workload: it must end in the verdict that names it, for the reason told.

`nox -s mutants` plants the same mutants at every small workload of their definitions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guards import bench_of, demand_caught, places, published, table

from refgrid.dataset.case import Case
from refgrid.mutants.judging import Judgement, planted_in, sizes
from refgrid.mutants.running import demand_plantable
from refgrid.mutants.table import Mutant, Place
from refgrid.proving.proof import Prover
from refgrid.sources import Sources

GEMM = ("gemm_n128_k2048", "edge_m129")

# Tests of one place stand together: a worker draws its inputs once.
PLANTED = [
    pytest.param(mutant, place, told, id=f"{mutant.id}-{place.workload}")
    for mutant, place, told in sorted(
        (
            (mutant, place, told)
            for mutant in table().values()
            if mutant.device == "cpu" and not mutant.equivalent
            for place, told in mutant.guarded
        ),
        key=lambda each: (each[1].definition, each[1].workload),
    )
]
EQUIVALENT = [
    pytest.param(mutant, id=mutant.id) for mutant in table().values() if mutant.device == "cpu" and mutant.equivalent
]


@pytest.mark.parametrize(("mutant", "place", "told"), PLANTED)
def test_a_planted_fault_turns_its_case_red_for_the_reason_told(mutant: Mutant, place: Place, told: str) -> None:
    demand_caught(bench_of(place).judge(mutant), mutant, told)


@pytest.mark.parametrize("mutant", EQUIVALENT)
def test_an_equivalent_mutant_changes_no_more_than_a_rounding(mutant: Mutant) -> None:
    assert bench_of(mutant.where).judge(mutant).fate in ("same", "rounding")


@pytest.mark.parametrize("place", places(), ids=lambda place: f"{place.definition}-{place.workload}-{place.source}")
def test_the_sound_code_matches_there_and_a_laptop_proves_it(place: Place) -> None:
    bench_of(place).prove(place.source)

    assert sizes(planted_in(published(), place))[place.workload] == "small"


def test_every_mutant_can_be_planted_also_those_that_need_a_gpu() -> None:
    demand_plantable(published(), list(table().values()))


JUDGED = Judgement("edge_b13", "caught", "mismatch", "torch", "output is off at [0, 3]")


@pytest.mark.parametrize(
    ("judgement", "failure"),
    [
        pytest.param(replace(JUDGED, fate="survived"), "survived, but should be caught", id="survived"),
        pytest.param(replace(JUDGED, fate="same"), "same, but should be caught", id="nothing changed"),
        pytest.param(replace(JUDGED, reason="lse is off"), "does not tell of 'output is off'", id="reason"),
        pytest.param(replace(JUDGED, verdict="error"), "error, but should be mismatch", id="verdict"),
    ],
)
def test_a_guard_that_does_not_fire_as_told_fails(judgement: Judgement, failure: str) -> None:
    mutant = table()["rmsnorm: weight plus one"]
    demand_caught(JUDGED, mutant, mutant.told)

    with pytest.raises(AssertionError, match=failure):
        demand_caught(judgement, mutant, mutant.told)


def test_a_truth_that_fails_half_way_leaves_no_damaged_weight_to_others() -> None:
    name, workload = GEMM
    case = Case(name, "gemm", "gemm", workload, "numerics", "spoiler")

    def adapter(source: str, _op: str, _device: str) -> Callable[..., dict[str, torch.Tensor]]:
        def spoiler(A: torch.Tensor, B: torch.Tensor) -> Any:  # noqa: N803 - the definition's names
            B.zero_()
            raise RuntimeError(f"{A.shape[0]} rows are too many")

        return spoiler if source == "spoiler" else lambda A, B: {"C": torch.nn.functional.linear(A, B)}  # noqa: N803

    table = tuple(SimpleNamespace(name=each, ops=("gemm",)) for each in ("spoiler", "sound"))
    prover = Prover(published(), Sources((SimpleNamespace(SOURCES=table, adapter=adapter),)), "cpu")

    with pytest.raises(RuntimeError, match="too many"):
        prover.prove(case)
    prover.prove(replace(case, source="sound"))

"""Which expert a failure of a mixture of experts is of: told where one was damaged, and not where it may be chance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_moe import NAMES, RENORM, dataset, definition, workload

from refgrid.dataset.case import Case, op_of
from refgrid.dataset.definition import Definition
from refgrid.proving.finding import Finding
from refgrid.proving.proof import Prover
from refgrid.proving.routed import chosen_experts, told_expert
from refgrid.proving.workbench import Workbench
from refgrid.sources import Sources

TOKENS = 61
MORE = {RENORM: {"num_local_experts": 48}}  # so that no expert is that of nearly all tokens
SOUND = "y = gemm2(torch.nn.functional.silu(gate) * up, e)"


def case_of(of: Definition) -> Case:
    return Case(of.name, of.op_type, op_of(of, Sources().ops), "w", "numerics", "oracle")


def most_taken(of: Definition) -> int:
    """The expert, of those that are here, through which most tokens go."""
    chosen = chosen_experts(Workbench(dataset(of, workload(of, TOKENS)), Sources(), "cpu").lay(case_of(of)))
    assert chosen is not None
    here = chosen[(chosen >= 0) & (chosen < 12)]
    return int(here.mode().values)


@pytest.mark.parametrize("name", NAMES)
def test_the_damaged_expert_is_named_by_the_failure(name: str) -> None:
    sound = definition(name, **MORE.get(name, {}))
    assert SOUND in sound.reference
    worst = most_taken(sound)
    text = sound.reference.replace(SOUND, f"{SOUND} * (-1 if e == {worst} else 1)")
    damaged = replace(sound, reference=text)

    with pytest.raises(Finding) as caught:
        Prover(dataset(damaged, workload(damaged, TOKENS)), Sources(), "cpu").prove(case_of(damaged))

    (told,) = [line for line in caught.value.report.splitlines() if "wrong rows" in line]
    assert told.endswith(f"of expert {worst}")


# Experts 0 to 3 have six rows each, 4 to 6 have eight; the last three have an expert that is elsewhere.
EXPERTS = torch.tensor([[row // 6, 4 + row % 3] for row in range(24)] + [[-1, 7]] * 3)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        pytest.param([6, 7, 8, 9, 10, 11], "the 6 wrong rows are all those of expert 1", id="all of an expert"),
        pytest.param([24, 25, 26], "the 3 wrong rows are all those of expert 7", id="all of the smallest"),
        pytest.param([6, 7, 9, 10, 11], "the 5 wrong rows are among the 6 of expert 1", id="all but one"),
        pytest.param([6], "", id="one"),
        pytest.param([6, 7], "", id="two that have an expert in common by chance"),
        pytest.param([6, 7, 8, 9, 10, 11, 12], "", id="one too many"),
        pytest.param(range(27), "", id="everywhere"),
        pytest.param([], "", id="nowhere"),
    ],
)
def test_an_expert_is_told_where_chance_would_hardly_have_it(wrong: list[int], told: str) -> None:
    rows = torch.zeros(len(EXPERTS), dtype=torch.bool)
    rows[list(wrong)] = True

    assert told_expert(rows, EXPERTS) == told


def test_other_ops_have_no_experts() -> None:
    plain = replace(definition(NAMES[0]), reference="def run(x):\n    return x")

    assert chosen_experts(Workbench(dataset(plain, workload(plain, 2)), Sources(), "cpu").lay(case_of(plain))) is None

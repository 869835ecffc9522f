"""Faults planted into the published references of sampling: each must end in the verdict that names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from refgrid.case import Case
from refgrid.definition import DataSet, load_dataset
from refgrid.finding import Finding
from refgrid.proof import Prover
from refgrid.record import Verdict
from refgrid.sources import Sources

TOP_K = "top_k_sampling_from_probs"
TOP_P = "top_p_sampling_from_probs"
BOTH = "top_k_top_p_sampling_from_probs"
SIZE = "_v128256"


class Fault(NamedTuple):
    """What to change in the reference of which op at which workload."""

    name: str
    op: str
    workload: str
    sound: str
    broken: str


FAULTS = [
    Fault("one token too many", TOP_K, "edge_b7", "return reaching(p, None, k)", "return reaching(p, None, k + 1)"),
    Fault("one token too few", TOP_K, "edge_b1", "return reaching(p, None, k)", "return reaching(p, None, k - 1)"),
    Fault("k of 0 taken as 1", TOP_K, "edge_b7", "(top_k < 1) | ", "(top_k < -1) | "),
    Fault("ties cut at k", TOP_K, "edge_ties_b7", "p < top_k_threshold(", "p <= top_k_threshold("),
    Fault("crossing token dropped", TOP_P, "edge_b2", "p < top_p_threshold(", "p <= top_p_threshold("),
    Fault("one token beyond the nucleus", TOP_P, "edge_b7", "top_p.double() *", "(top_p.double() + 0.1) *"),
    Fault("top_p of 0 taken as no filter", TOP_P, "edge_argmax_b4", "torch.where(top_p < 1,", "torch.where(top_p > 0,"),
    Fault("top_p of the mass before top_k", BOTH, "edge_b7", "mass.sum(dim=1, keepdim=True)", "1.0"),
    Fault("top_k left out", BOTH, "edge_b7", "if top_k is not None:", "if top_k is None:"),
    Fault("top_p left out", BOTH, "edge_b7", "if top_p is not None:", "if top_p is None:"),
    Fault("temperature of one half", TOP_K, "edge_b7", "reached = mass.cumsum_", "reached = mass.square_().cumsum_"),
    Fault("not renormalised", TOP_K, "edge_b7", "u * reached[:, -1:]", "u.expand(-1, 1)"),
    Fault("drawn by a biased number", TOP_K, "edge_b7", "u * reached[:, -1:]", "u.pow(4) * reached[:, -1:]"),
    Fault("the likeliest token alone", TOP_P, "edge_b2", "reached = mass.cumsum_(dim=1)", "return mass.argmax(dim=1)"),
    Fault("one number for all rows", TOP_K, "edge_b3", "draw(mass, u[part])", "draw(mass, u[:1].expand(len(mass), 1))"),
    Fault("next token", TOP_P, "edge_b2", "right=True)[:, 0]", "right=True)[:, 0] + 1"),
]  # fmt: skip


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(Path(__file__).resolve().parents[1])


def prove(dataset: DataSet, op: str, workload: str, sound: str = "", broken: str = "") -> None:
    """Prove one case against the exact law with the reference's text changed; the change must be one."""
    definition = dataset.definitions[op + SIZE]
    assert sound in definition.reference, f"{sound!r} is not in the reference of {op}: the fault plants nothing"
    changed = replace(definition, reference=definition.reference.replace(sound, broken))
    case = Case(definition.name, definition.op_type, op, workload, "numerics", "oracle")
    Prover(replace(dataset, definitions={definition.name: changed}), Sources(), "cpu").prove(case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_a_token(dataset: DataSet, fault: Fault) -> None:
    with pytest.raises(
        Finding, match=r"samples is token \d+ in \S+ of the draws of row \d+ but should be in"
    ) as caught:
        prove(dataset, fault.op, fault.workload, fault.sound, fault.broken)

    assert caught.value.verdict is Verdict.MISMATCH


@pytest.mark.parametrize(("op", "workload"), sorted({(fault.op, fault.workload) for fault in FAULTS}))
def test_the_unchanged_reference_matches_there(dataset: DataSet, op: str, workload: str) -> None:
    prove(dataset, op, workload)


def test_a_sampler_that_forgets_its_seed_is_not_deterministic(dataset: DataSet) -> None:
    definition = dataset.definitions[TOP_K + SIZE]
    text = definition.reference.replace("u = torch.rand(", "torch.seed()\n    u = torch.rand(")
    assert text != definition.reference
    case = Case(definition.name, definition.op_type, TOP_K, "edge_b7", "determinism")

    changed = replace(dataset, definitions={definition.name: replace(definition, reference=text)})
    prover = Prover(changed, Sources(), "cpu")

    with pytest.raises(Finding, match="samples differs between two runs of the reference") as caught:
        prover.prove(case)

    assert caught.value.verdict is Verdict.NONDETERMINISTIC

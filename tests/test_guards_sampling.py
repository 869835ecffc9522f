"""Faults planted into the published references of sampling: each must end in the verdict that names it."""

from __future__ import annotations

import pytest
from guards import Fault, demand_caught, prove, published

from refgrid.records.record import Verdict

TOP_K = "top_k_sampling_from_probs_v128256"
TOP_P = "top_p_sampling_from_probs_v128256"
BOTH = "top_k_top_p_sampling_from_probs_v128256"
A_TOKEN = r"samples is token \d+ in \S+ of the draws of row \d+ but should be in"


def wrong(name: str, op: str, workload: str, sound: str, broken: str) -> Fault:
    return Fault(name, (op, workload), sound, broken, A_TOKEN)


FAULTS = [
    wrong("one token too many", TOP_K, "edge_b7", "return reaching(p, None, k)", "return reaching(p, None, k + 1)"),
    wrong("one token too few", TOP_K, "edge_b1", "return reaching(p, None, k)", "return reaching(p, None, k - 1)"),
    wrong("k of 0 taken as 1", TOP_K, "edge_b7", "(top_k < 1) | ", "(top_k < -1) | "),
    wrong("ties cut at k", TOP_K, "edge_ties_b7", "p < top_k_threshold(", "p <= top_k_threshold("),
    wrong("crossing token dropped", TOP_P, "edge_b2", "p < top_p_threshold(", "p <= top_p_threshold("),
    wrong("one token beyond the nucleus", TOP_P, "edge_b7", "top_p.double() *", "(top_p.double() + 0.1) *"),
    wrong("top_p of 0 taken as no filter", TOP_P, "edge_argmax_b4", "torch.where(top_p < 1,", "torch.where(top_p > 0,"),
    wrong("top_p of the mass before top_k", BOTH, "edge_b7", "mass.sum(dim=1, keepdim=True)", "1.0"),
    wrong("top_k left out", BOTH, "edge_b7", "if top_k is not None:", "if top_k is None:"),
    wrong("top_p left out", BOTH, "edge_b7", "if top_p is not None:", "if top_p is None:"),
    wrong("temperature of one half", TOP_K, "edge_b7", "reached = mass.cumsum_", "reached = mass.square_().cumsum_"),
    wrong("not renormalised", TOP_K, "edge_b7", "u * reached[:, -1:]", "u.expand(-1, 1)"),
    wrong("drawn by a biased number", TOP_K, "edge_b7", "u * reached[:, -1:]", "u.pow(4) * reached[:, -1:]"),
    wrong("the likeliest token alone", TOP_P, "edge_b2", "reached = mass.cumsum_(dim=1)", "return mass.argmax(dim=1)"),
    wrong("one number for all rows", TOP_K, "edge_b3", "draw(mass, u[part])", "draw(mass, u[:1].expand(len(mass), 1))"),
    wrong("next token", TOP_P, "edge_b2", "right=True)[:, 0]", "right=True)[:, 0] + 1"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_a_token(fault: Fault) -> None:
    demand_caught(published(), fault)


@pytest.mark.parametrize("where", sorted({fault.where for fault in FAULTS}), ids="-".join)
def test_the_unchanged_reference_matches_there(where: tuple[str, str]) -> None:
    prove(published(), where)


def test_a_sampler_that_forgets_its_seed_is_not_deterministic() -> None:
    sound, told = "u = torch.rand(", "samples differs between two runs of the reference"
    forgetful = f"torch.seed()\n    {sound}"
    fault = Fault("seed forgotten", (TOP_K, "edge_b7"), sound, forgetful, told, Verdict.NONDETERMINISTIC)

    demand_caught(published(), fault, source=None, check="determinism")

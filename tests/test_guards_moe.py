"""Faults planted into the published references of mixtures of experts: each must end in a mismatch of the output."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import small_moe
from small_moe import FP4, FP4_ONE, GROUPS, NAMES, NO_GROUPS, PER_TENSOR, PER_TENSOR_ONE, RENORM, ROUTED, ROUTED_ONE

from refgrid.case import Case, op_of
from refgrid.finding import Finding
from refgrid.proof import Prover
from refgrid.record import Verdict
from refgrid.sources import Sources


class Fault(NamedTuple):
    """What to change in whose reference."""

    name: str
    where: str
    sound: str
    broken: str


FAULTS = [
    Fault("halves of GEMM1 exchanged", RENORM, "up, gate = ", "gate, up = "),
    Fault("halves exchanged, no scales", FP4, "up, gate = ", "gate, up = "),
    Fault("no activation", FP4, "torch.nn.functional.silu(gate)", "gate"),
    Fault("gelu for silu", FP4, "torch.nn.functional.silu(gate)", "torch.nn.functional.gelu(gate)"),
    Fault("one expert too few", RENORM, "top_k=10", "top_k=9"),
    Fault(
        "softmax over all experts",
        FP4,
        "return largest.softmax(dim=1), expert",
        "return logits.float().softmax(dim=1).gather(1, expert), expert",
    ),
    Fault("smallest in place of largest", FP4, ".topk(top_k, dim=1)", ".topk(top_k, dim=1, largest=False)"),
    Fault(
        "bias in the weights",
        NO_GROUPS,
        "weight = s.gather(1, expert)",
        "weight = (s + bias.float()).gather(1, expert)",
    ),
    Fault("bias not used", NO_GROUPS, "(s + bias.float())", "s"),
    Fault(
        "weights not normalised",
        NO_GROUPS,
        "return weight / (weight.sum(dim=1, keepdim=True) + 1e-20), expert",
        "return weight, expert",
    ),
    Fault("scaling factor dropped", GROUPS, "weight * routed_scaling_factor", "weight"),
    Fault("all groups stay in", GROUPS, "topk_group=4", "topk_group=8"),
    Fault("a group counts by its best alone", GROUPS, "choice.topk(2, dim=2)", "choice.topk(1, dim=2)"),
    Fault("local experts from the first on", GROUPS, "expert - local_expert_offset", "expert"),
    Fault("local experts one further on", GROUPS, "expert - local_expert_offset", "expert - local_expert_offset - 1"),
    Fault(
        "experts elsewhere wrap around", GROUPS, "expert - local_expert_offset", "(expert - local_expert_offset) % 12"
    ),
    Fault(
        "token scales of another token",
        RENORM,
        "hidden_states_scale.T[token]",
        "hidden_states_scale.T.roll(1, 0)[token]",
    ),
    Fault(
        "block scales of another row",
        RENORM,
        "scale.repeat_interleave(w.shape[0] // scale.shape[0], dim=0)",
        "scale.roll(1, 0).repeat_interleave(w.shape[0] // scale.shape[0], dim=0)",
    ),
    Fault("block scales of another column", RENORM, "* scale[:, :, None]", "* scale.roll(1, 1)[:, :, None]"),
    Fault(
        "scales of up and gate exchanged",
        PER_TENSOR,
        "(output1_scales_scalar, output1_scales_gate_scalar)",
        "(output1_scales_gate_scalar, output1_scales_scalar)",
    ),
    Fault("second scale of another expert", PER_TENSOR, "output2_scales_scalar[e,", "output2_scales_scalar[e - 1,"),
    Fault(
        "input divided by the weight",
        PER_TENSOR_ONE,
        "widen(hidden_states[token]) * weight[token]",
        "widen(hidden_states[token]) / weight[token]",
    ),
    Fault("weight on the input and the output", PER_TENSOR_ONE, "torch.ones_like(weight)", "weight"),
    Fault(
        "softmax of one in place of the sigmoid",
        FP4_ONE,
        "return largest.sigmoid(), expert",
        "return torch.ones_like(largest), expert",
    ),
    Fault(
        "bias chooses the one expert",
        FP4_ONE,
        "del routing_bias\n    weight, expert = route_to_one(routing_logits)",
        "weight, expert = route_to_one(routing_logits + routing_bias)",
    ),
    Fault(
        "weights converted and not read again",
        ROUTED,
        "(topk_ids << 16).view(torch.float32)",
        "(topk_ids & 0xFFFF).float()",
    ),
    Fault(
        "weights made of sum one",
        ROUTED,
        "    return mix_experts(",
        "    weight = weight / weight.sum(dim=1, keepdim=True)\n    return mix_experts(",
    ),
    Fault("weights of another token's order", ROUTED, "weight.flatten()[order, None]", "weight.flatten()[:, None]"),
    Fault("expert numbers from the lower bits", ROUTED_ONE, "topk_ids.long() >> 16 & 0xFFFF", "topk_ids.long() & 0xF"),
    Fault("last expert left out", ROUTED, "range(shape[0])", "range(shape[0] - 1)"),
    Fault("first expert left out", ROUTED, "range(shape[0])", "range(1, shape[0])"),
    Fault(
        "last token of an expert left out",
        FP4,
        "min(begin + BLOCK_ROWS, bounds[e + 1])",
        "min(begin + BLOCK_ROWS, bounds[e + 1] - 1)",
    ),
]


def prove(name: str, sound: str = "", broken: str = "") -> None:
    """Prove one small case against the oracle with the reference's text changed; the change must be one."""
    of = small_moe.definition(name)
    assert sound in of.reference, f"{sound!r} is not in the reference of {name}: the fault plants nothing"
    changed = replace(of, reference=of.reference.replace(sound, broken))
    dataset = small_moe.dataset(changed, small_moe.workload(of, 29, "t29"))
    sources = Sources()
    case = Case(name, of.op_type, op_of(of, sources.ops), "t29", "numerics", "oracle")
    Prover(dataset, sources, "cpu").prove(case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch(fault: Fault) -> None:
    with pytest.raises(Finding) as caught:
        prove(fault.where, fault.sound, fault.broken)

    assert caught.value.verdict is Verdict.MISMATCH
    assert "output is" in caught.value.reason


@pytest.mark.parametrize("name", NAMES)
def test_the_unchanged_reference_matches_there(name: str) -> None:
    prove(name)

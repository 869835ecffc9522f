"""Faults planted into the published references of mixtures of experts: each must end in a mismatch of the output."""

from __future__ import annotations

import pytest
import small_moe
from guards import Fault, demand_caught, prove
from small_moe import FP4, FP4_ONE, GROUPS, NAMES, NO_GROUPS, PER_TENSOR, PER_TENSOR_ONE, RENORM, ROUTED, ROUTED_ONE

from refgrid.dataset.definition import DataSet

TOKENS = "t29"


def wrong(name: str, of: str, sound: str, broken: str) -> Fault:
    return Fault(name, (of, TOKENS), sound, broken, "output is")


FAULTS = [
    wrong("halves of GEMM1 exchanged", RENORM, "up, gate = ", "gate, up = "),
    wrong("halves exchanged, no scales", FP4, "up, gate = ", "gate, up = "),
    wrong("no activation", FP4, "torch.nn.functional.silu(gate)", "gate"),
    wrong("gelu for silu", FP4, "torch.nn.functional.silu(gate)", "torch.nn.functional.gelu(gate)"),
    wrong("one expert too few", RENORM, "top_k=10", "top_k=9"),
    wrong(
        "softmax over all experts",
        FP4,
        "return largest.softmax(dim=1), expert",
        "return logits.float().softmax(dim=1).gather(1, expert), expert",
    ),
    wrong("smallest in place of largest", FP4, ".topk(top_k, dim=1)", ".topk(top_k, dim=1, largest=False)"),
    wrong(
        "bias in the weights",
        NO_GROUPS,
        "weight = s.gather(1, expert)",
        "weight = (s + bias.float()).gather(1, expert)",
    ),
    wrong("bias not used", NO_GROUPS, "(s + bias.float())", "s"),
    wrong(
        "weights not normalised",
        NO_GROUPS,
        "return weight / (weight.sum(dim=1, keepdim=True) + 1e-20), expert",
        "return weight, expert",
    ),
    wrong("scaling factor dropped", GROUPS, "weight * routed_scaling_factor", "weight"),
    wrong("all groups stay in", GROUPS, "topk_group=4", "topk_group=8"),
    wrong("a group counts by its best alone", GROUPS, "choice.topk(2, dim=2)", "choice.topk(1, dim=2)"),
    wrong("local experts from the first on", GROUPS, "expert - local_expert_offset", "expert"),
    wrong("local experts one further on", GROUPS, "expert - local_expert_offset", "expert - local_expert_offset - 1"),
    wrong(
        "experts elsewhere wrap around", GROUPS, "expert - local_expert_offset", "(expert - local_expert_offset) % 12"
    ),
    wrong(
        "token scales of another token",
        RENORM,
        "hidden_states_scale.T[token]",
        "hidden_states_scale.T.roll(1, 0)[token]",
    ),
    wrong(
        "block scales of another row",
        RENORM,
        "scale.repeat_interleave(w.shape[0] // scale.shape[0], dim=0)",
        "scale.roll(1, 0).repeat_interleave(w.shape[0] // scale.shape[0], dim=0)",
    ),
    wrong("block scales of another column", RENORM, "* scale[:, :, None]", "* scale.roll(1, 1)[:, :, None]"),
    wrong(
        "scales of up and gate exchanged",
        PER_TENSOR,
        "(output1_scales_scalar, output1_scales_gate_scalar)",
        "(output1_scales_gate_scalar, output1_scales_scalar)",
    ),
    wrong("second scale of another expert", PER_TENSOR, "output2_scales_scalar[e,", "output2_scales_scalar[e - 1,"),
    wrong(
        "input divided by the weight",
        PER_TENSOR_ONE,
        "widen(hidden_states[token]) * weight[token]",
        "widen(hidden_states[token]) / weight[token]",
    ),
    wrong("weight on the input and the output", PER_TENSOR_ONE, "torch.ones_like(weight)", "weight"),
    wrong(
        "softmax of one in place of the sigmoid",
        FP4_ONE,
        "return largest.sigmoid(), expert",
        "return torch.ones_like(largest), expert",
    ),
    wrong(
        "bias chooses the one expert",
        FP4_ONE,
        "del routing_bias\n    weight, expert = route_to_one(routing_logits)",
        "weight, expert = route_to_one(routing_logits + routing_bias)",
    ),
    wrong(
        "weights converted and not read again",
        ROUTED,
        "(topk_ids << 16).view(torch.float32)",
        "(topk_ids & 0xFFFF).float()",
    ),
    wrong(
        "weights made of sum one",
        ROUTED,
        "    return mix_experts(",
        "    weight = weight / weight.sum(dim=1, keepdim=True)\n    return mix_experts(",
    ),
    wrong("weights of another token's order", ROUTED, "weight.flatten()[order, None]", "weight.flatten()[:, None]"),
    wrong("expert numbers from the lower bits", ROUTED_ONE, "topk_ids.long() >> 16 & 0xFFFF", "topk_ids.long() & 0xF"),
    wrong("last expert left out", ROUTED, "range(shape[0])", "range(shape[0] - 1)"),
    wrong("first expert left out", ROUTED, "range(shape[0])", "range(1, shape[0])"),
    wrong(
        "last token of an expert left out",
        FP4,
        "min(begin + BLOCK_ROWS, bounds[e + 1])",
        "min(begin + BLOCK_ROWS, bounds[e + 1] - 1)",
    ),
]


def _small(name: str) -> DataSet:
    of = small_moe.definition(name)
    return small_moe.dataset(of, small_moe.workload(of, 29, TOKENS))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch(fault: Fault) -> None:
    demand_caught(_small(fault.where[0]), fault)


@pytest.mark.parametrize("name", NAMES)
def test_the_unchanged_reference_matches_there(name: str) -> None:
    prove(_small(name), (name, TOKENS))

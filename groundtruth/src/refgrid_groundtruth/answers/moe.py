"""Experts that multiply by a number of their own, so that an output is a weighted sum of these numbers.

W1 gives each of the INTERMEDIATE columns the same `up`, and a gate of at least 8, for which silu is the gate itself but
for 3e-4. W2 is a multiple of the identity for the first half of the output and minus twice that for the second half.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

HIDDEN, INTERMEDIATE = 256, 128
OWN = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.5)  # what expert e multiplies by; e2m1 times a power of two, for mxfp4
FP8 = torch.float8_e4m3fn


def _hidden(first: list[float], second: float, third: float) -> torch.Tensor:
    """Tokens that are zero but in columns 0 (a number each), 1 and 128."""
    x = torch.zeros(len(first), HIDDEN)
    x[:, 0], x[:, 1], x[:, 128] = torch.tensor(first), second, torch.tensor(first) * third
    return x


def _gemm1() -> torch.Tensor:
    """up = x[0] + 2 x[128], gate = x[1]: [experts, 2 * INTERMEDIATE, HIDDEN], [up | gate]."""
    w = torch.zeros(len(OWN), 2 * INTERMEDIATE, HIDDEN)
    w[:, :INTERMEDIATE, 0], w[:, :INTERMEDIATE, 128], w[:, INTERMEDIATE:, 1] = 1.0, 2.0, 1.0
    return w


def _gemm2(second_half: float) -> torch.Tensor:
    """OWN[e] times the identity, and `second_half` times that below: [experts, HIDDEN, INTERMEDIATE]."""
    identity = torch.eye(INTERMEDIATE)
    return torch.tensor(OWN)[:, None, None] * torch.cat((identity, second_half * identity))


def _output(mixed: list[float]) -> dict[str, torch.Tensor]:
    """The weighted sum of each token in the first half of its output, minus twice that in the second."""
    signs = torch.tensor([1.0] * INTERMEDIATE + [-2.0] * (HIDDEN - INTERMEDIATE))
    return {"output": (torch.tensor(mixed)[:, None] * signs).bfloat16()}


def _block_scaled(first: list[float]) -> dict[str, torch.Tensor]:
    """Scales make up = first, gate = 16, the output OWN[e] * first.

    x[0] is 2 and x[128] 1/2 times what is stored, x[1] 16; the blocks of W1 give a quarter of the first, half of the
    second and the gate as it is; those of W2 a sixteenth and an eighth.
    """
    scale = torch.tensor([[2.0], [0.5]]).repeat(1, len(first))
    return {
        "hidden_states": _hidden(first, 8.0, 1.0).to(FP8),
        "hidden_states_scale": scale,
        "gemm1_weights": _gemm1().to(FP8),
        "gemm1_weights_scale": torch.tensor([[0.25, 0.5], [1.0, 1.0]]).repeat(len(OWN), 1, 1),
        "gemm2_weights": _gemm2(-1.0).to(FP8),
        "gemm2_weights_scale": torch.tensor([[1 / 16], [1 / 8]]).repeat(len(OWN), 1, 1),
    }


def _moe_fp8_block_scale_ds_routing() -> Answer:
    """32 experts in 8 groups of 4, of which 4 stay; experts 4 to 11 are here. A sigmoid is 0.1 unless said.

    Token 0: groups 0 to 2 hold 0.8 and 0.7 each, group 3 0.75 and 0.6, groups 4 to 7 one of 0.9, which is less than
    two. The bias of 1 brings in expert 6 at 0.25 for expert 13. The weights have the sum 3 * 1.5 + 0.75 + 0.25 = 5.5,
    and the factor is 5.5. Token 1: groups 4 to 7 hold 0.8 and 0.7: none is here. Token 2, all logits negative: groups 1
    to 3 hold 0.3 and 0.2, group 4 0.25 and 0.15, which loses to expert 6; the sum is 3 * 0.5 + 0.25 + 0.1 = 1.85. The
    two best of a group that stays differ: SGLang's router counts equal ones once.
    """
    p = torch.full((3, 32), 0.1, dtype=torch.float64)
    p[0, [0, 4, 8]], p[0, [1, 5, 9]], p[0, 12], p[0, 13] = 0.8, 0.7, 0.75, 0.6
    p[0, 6], p[0, [16, 20, 24, 28]] = 0.25, 0.9
    p[1, [16, 20, 24, 28]], p[1, [17, 21, 25, 29]] = 0.8, 0.7
    p[2, [4, 8, 12]], p[2, [5, 9, 13]], p[2, 16], p[2, 17] = 0.3, 0.2, 0.25, 0.15
    bias = torch.zeros(32, dtype=torch.bfloat16)
    bias[6] = 1.0
    given = {"routing_logits": (p / (1 - p)).log().float(), "routing_bias": bias, **_block_scaled([1.0, 1.0, 2.0])}
    first, second, sixth = OWN[0] + OWN[4], OWN[1] + OWN[5], OWN[2]
    last = 2 * 5.5 / 1.85 * (0.3 * first + 0.2 * second + 0.1 * sixth)
    mixed = [0.8 * first + 0.7 * second + 0.25 * sixth, 0.0, last]
    constants = {"n_group": 8, "topk_group": 4, "top_k": 8}
    return {**given, "local_expert_offset": 4, "routed_scaling_factor": 5.5, **constants}, _output(mixed)


def _two_of_eight() -> tuple[torch.Tensor, list[float]]:
    """Logits of three tokens, and what the two chosen experts of each, weighted by the softmax over them, mix to.

    Halves of experts 2 and 5; three quarters of expert 7 and a quarter of expert 0 (ln 3 apart); halves of experts 1
    and 3, all logits negative.
    """
    logits = -torch.arange(4.0, 12.0).repeat(3, 1)
    logits[0, [2, 5]], logits[1, 7], logits[1, 0], logits[2, [1, 3]] = 1.0, math.log(3), 0.0, -1.0
    return logits.bfloat16(), [
        (OWN[2] + OWN[5]) / 2,
        0.75 * OWN[7] + 0.25 * OWN[0],
        (OWN[1] + OWN[3]) / 2,
    ]


def _one_of_eight() -> tuple[torch.Tensor, list[int], list[float]]:
    """Logits of three tokens, the expert of each, and the sigmoid of its logit: 0, 16, and -ln 3 where all are less."""
    logits = -torch.arange(4.0, 12.0).repeat(3, 1)
    experts = [5, 0, 7]
    logits[torch.arange(3), experts] = torch.tensor([0.0, 16.0, -math.log(3)])
    return logits.bfloat16(), experts, [0.5, 1.0, 0.25]


def _bias() -> torch.Tensor:
    """Would send every token to expert 3."""
    return torch.eye(len(OWN))[3].mul(100).bfloat16()


def _moe_fp8_block_scale_renorm() -> Answer:
    logits, mixed = _two_of_eight()
    given = {"routing_logits": logits, **_block_scaled([1.0, 2.0, 4.0]), "top_k": 2}
    return given, _output([mixed[0], 2 * mixed[1], 4 * mixed[2]])


def _per_tensor(gate: float) -> dict[str, torch.Tensor]:
    """The gate is twice what is stored, up = 2 * 3, an intermediate is stored twice as large as it is.

    Even experts divide by 2 * 64, which takes that back, odd ones by half of that. With a gate of 2 g an even expert
    gives OWN[e] * 6 * 2 g / 64, an odd one twice that.
    """
    down = torch.tensor([1.0, 2.0]).repeat(len(OWN) // 2) / 128
    return {
        "hidden_states": _hidden([1.0] * 3, gate, 1.0).to(FP8),
        "gemm1_weights": _gemm1().to(FP8),
        "output1_scales_scalar": torch.full((len(OWN),), 4.0),
        "output1_scales_gate_scalar": torch.full((len(OWN),), 2.0),
        "gemm2_weights": _gemm2(-2.0).to(FP8),
        "output2_scales_scalar": down,
    }


def _trtllm_fp8_per_tensor_scale_moe() -> Answer:
    """Gate 16: an even expert gives OWN[e] * 6 * 16 / 64 = 1.5 OWN[e], an odd one 3 OWN[e]."""
    logits, _ = _two_of_eight()
    given = {"routing_logits": logits, **_per_tensor(8.0), "top_k": 2}
    mixed = [
        (1.5 * OWN[2] + 3 * OWN[5]) / 2,
        0.75 * 3 * OWN[7] + 0.25 * 1.5 * OWN[0],
        3 * (OWN[1] + OWN[3]) / 2,
    ]
    return given, _output(mixed)


def _trtllm_fp8_per_tensor_scale_moe_topk1() -> Answer:
    """Gate 32 and up = 6, each times the weight, as both are linear in the input."""
    logits, experts, weights = _one_of_eight()
    given = {"routing_logits": logits, **_per_tensor(16.0), "routing_bias": _bias()}
    mixed = [OWN[e] * (1 + e % 2) * 6 * 32 / 64 * w * w for e, w in zip(experts, weights, strict=True)]
    return given, _output(mixed)


def _mxfp4(gate: float) -> dict[str, torch.Tensor]:
    """up = 3, and with a gate of g the output is OWN[e] * 3 g / 16."""
    return {
        "hidden_states": _hidden([1.0] * 3, gate, 1.0).bfloat16(),
        "gemm1_weights": _gemm1(),
        "gemm2_weights": _gemm2(-2.0) / 16,
    }


def _trtllm_fp4_block_scale_moe() -> Answer:
    logits, mixed = _two_of_eight()
    return {"routing_logits": logits, **_mxfp4(16.0), "top_k": 2}, _output([3 * each for each in mixed])


def _trtllm_fp4_block_scale_moe_topk1() -> Answer:
    """Gate 32 and up = 3, each times the weight, as both are linear in the input."""
    logits, experts, weights = _one_of_eight()
    mixed = [OWN[e] * 3 * 32 / 16 * w * w for e, w in zip(experts, weights, strict=True)]
    return {"routing_logits": logits, **_mxfp4(32.0), "routing_bias": _bias()}, _output(mixed)


def _trtllm_fp4_block_scale_routed_moe() -> Answer:
    """Experts 7 and 0, 3 and 4, 6 and 1, weights of any sum; as bfloat16 1 is 3F80, 3/4 3F40, 1/2 3F00, 1/4 3E80."""
    packed = [[0x0007_3F00, 0x0000_3F80], [0x0003_3E80, 0x0004_3F40], [0x0006_3E80, 0x0001_3E80]]
    mixed = [0.5 * OWN[7] + OWN[0], 0.25 * OWN[3] + 0.75 * OWN[4], 0.25 * OWN[6] + 0.25 * OWN[1]]
    given = {"topk_ids": torch.tensor(packed, dtype=torch.int32), **_mxfp4(16.0)}
    return given, _output([3 * each for each in mixed])


CASES: dict[str, Callable[[], Answer]] = {
    "moe_fp8_block_scale_ds_routing": _moe_fp8_block_scale_ds_routing,
    "moe_fp8_block_scale_renorm": _moe_fp8_block_scale_renorm,
    "trtllm_fp8_per_tensor_scale_moe": _trtllm_fp8_per_tensor_scale_moe,
    "trtllm_fp8_per_tensor_scale_moe_topk1": _trtllm_fp8_per_tensor_scale_moe_topk1,
    "trtllm_fp4_block_scale_moe": _trtllm_fp4_block_scale_moe,
    "trtllm_fp4_block_scale_moe_topk1": _trtllm_fp4_block_scale_moe_topk1,
    "trtllm_fp4_block_scale_routed_moe": _trtllm_fp4_block_scale_routed_moe,
}

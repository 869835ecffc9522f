"""Mixtures of experts by cutlass_fused_moe, and on compute capability 10 by trtllm_fp8_block_scale_moe.

Read in 0.5.3, 0.6.7.post3, 0.6.12 and 0.7.2.post1. Both have GEMM1 as [up | gate], as the definitions have. Llama 4's
routing is left out: cutlass_fused_moe has no weight on the input. In fp8 blocks it takes bfloat16 hidden states and
quantises them again, and it rounds what goes into GEMM2 to fp8, which no definition says; the table of tolerances
holds by how much. The other trtllm functions want shuffled weights and are left out.
"""

from __future__ import annotations

from typing import Any

import flashinfer
import flashinfer.fused_moe
import flashinfer.sampling
import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.experts import dequantised_input, in_bfloat16, on_this_rank, unpacked

RENORMALISE, DEEPSEEK = 1, 2  # RoutingMethodType


def moe_fp8_block_scale_ds_routing(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    n_group: int,
    topk_group: int,
    top_k: int,
    trtllm: bool = False,
) -> dict[str, torch.Tensor]:
    """fused_topk_deepseek, then the experts; shapes as in the definition -> output [seq_len, hidden_size].

    The first of two ranks holds the experts that are here, the second all others. Raises Unavailable("unsupported")
    for groups that the router declines, among them those of one group of which one is kept.
    """
    if trtllm:
        experts = hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights
        groups = top_k, n_group, topk_group, int(local_expert_offset), float(routed_scaling_factor)
        return _trtllm(routing_logits, routing_bias, *experts, gemm2_weights_scale, *groups, method=DEEPSEEK)
    weight = routing_logits.new_empty(len(routing_logits), top_k)
    expert = torch.empty_like(weight, dtype=torch.int32)
    try:
        flashinfer.fused_moe.fused_topk_deepseek(
            *(routing_logits, routing_bias.float(), n_group, topk_group, top_k, float(routed_scaling_factor)),
            *(weight, expert),
        )
    except ValueError as declined:
        raise Unavailable("unsupported", str(declined)) from declined
    count = len(gemm1_weights)
    expert = on_this_rank(expert, int(local_expert_offset), count, elsewhere=count)
    ranks = 1 if count == routing_logits.shape[1] else 2
    x = dequantised_input(hidden_states, hidden_states_scale).bfloat16()
    scales = [gemm1_weights_scale, gemm2_weights_scale]
    blocks: dict[str, Any] = {"quant_scales": scales, "use_deepseek_fp8_block_scale": True}
    return _experts(x, expert, weight, gemm1_weights, gemm2_weights, ep_size=ranks, **blocks)


def moe_fp8_block_scale_renorm(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    *,
    top_k: int,
    trtllm: bool = False,
) -> dict[str, torch.Tensor]:
    """top_k and softmax, then the experts; shapes as in the definition -> output [seq_len, hidden_size]."""
    if trtllm:
        experts = hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights
        return _trtllm(
            *(routing_logits, None, *experts, gemm2_weights_scale, top_k, None, None, 0, None), method=RENORMALISE
        )
    x = dequantised_input(hidden_states, hidden_states_scale).bfloat16()
    expert, weight = _renormalised(routing_logits, top_k)
    scales = [gemm1_weights_scale, gemm2_weights_scale]
    blocks: dict[str, Any] = {"quant_scales": scales, "use_deepseek_fp8_block_scale": True}
    return _experts(x, expert, weight, gemm1_weights, gemm2_weights, **blocks)


def trtllm_fp8_per_tensor_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    *,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """top_k and softmax, then the experts on fp8 hidden_states as they are -> output [seq_len, hidden_size].

    The kernel has one scale for gate and up; what up has beyond it is what the intermediate is multiplied by before it
    is rounded to fp8. The input's scale is in theirs already.
    """
    expert, weight = _renormalised(routing_logits, top_k)
    scales = [
        output1_scales_gate_scalar,
        output1_scales_scalar / output1_scales_gate_scalar,
        output2_scales_scalar,
        torch.ones((), device=hidden_states.device),
    ]
    return _experts(hidden_states, expert, weight, gemm1_weights, gemm2_weights, quant_scales=scales)


def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    *,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """top_k and softmax, then the experts in bfloat16, in which the weights are the same numbers -> output."""
    weights = in_bfloat16(gemm1_weights), in_bfloat16(gemm2_weights)
    return _experts(hidden_states, *_renormalised(routing_logits, top_k), *weights)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor, hidden_states: torch.Tensor, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The experts in bfloat16, in which the weights are the same numbers, with the routing of topk_ids -> output."""
    return _experts(hidden_states, *unpacked(topk_ids), in_bfloat16(gemm1_weights), in_bfloat16(gemm2_weights))


def _trtllm(
    routing_logits: torch.Tensor,
    routing_bias: torch.Tensor | None,
    hidden_states: torch.Tensor,
    hidden_states_scale: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_weights_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_weights_scale: torch.Tensor,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    local_expert_offset: int,
    routed_scaling_factor: float | None,
    *,
    method: int,
) -> dict[str, torch.Tensor]:
    """trtllm_fp8_block_scale_moe, from whose interface the definitions are: weights as they are, not shuffled."""
    output = flashinfer.fused_moe.trtllm_fp8_block_scale_moe(
        *(routing_logits, routing_bias, hidden_states, hidden_states_scale),
        *(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale),
        *(routing_logits.shape[1], top_k, n_group, topk_group, gemm2_weights.shape[2]),
        *(local_expert_offset, len(gemm1_weights), routed_scaling_factor),
        routing_method_type=method,
        use_shuffled_weight=False,
    )
    return {"output": output}


def _renormalised(routing_logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FlashInfer has no router of this kind: its top_k of the logits, and its softmax over these -> expert, weight."""
    logit, expert = flashinfer.top_k(routing_logits.float(), top_k)
    return expert.int(), flashinfer.sampling.softmax(logit)


def _experts(
    x: torch.Tensor,
    expert: torch.Tensor,
    weight: torch.Tensor,
    gemm1: torch.Tensor,
    gemm2: torch.Tensor,
    *,
    quant_scales: list[torch.Tensor] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor]:
    output = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    flashinfer.fused_moe.cutlass_fused_moe(
        *(x, expert, weight, gemm1, gemm2, torch.bfloat16),
        quant_scales=quant_scales,  # None where nothing is quantised, as in its own tests
        output=output,
        **options,
    )
    return {"output": output}

"""Mixtures of experts by SGLang's Triton kernels; read in sglang 0.5.15.

The Triton router is called by its own name: biased_grouped_topk_gpu goes to FlashInfer's where that is installed, and
one kernel under two names must not count as two truths. The fp8 path takes bfloat16 hidden states and quantises them
again, and it rounds what goes into GEMM2 to fp8, which no definition says; the table of tolerances holds by how much.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.jit_kernel.moe_fused_gate import moe_fused_gate
from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig
from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_moe
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.server_args import ServerArgs, get_global_server_args, set_global_server_args_for_scheduler

from refgrid_groundtruth.experts import BLOCK, dequantised_input, gate_first, in_bfloat16, on_this_rank, unpacked

if TYPE_CHECKING:
    Routing = tuple[torch.Tensor, torch.Tensor]  # weights float32 and expert numbers int32, [seq_len, top_k] each


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
) -> dict[str, torch.Tensor]:
    """moe_fused_gate with groups, then the experts; shapes as in the definition -> output [seq_len, hidden_size]."""
    weight, expert = moe_fused_gate(
        routing_logits,
        routing_bias.float(),
        top_k,
        scoring_func="sigmoid",
        renormalize=True,
        routed_scaling_factor=float(routed_scaling_factor),
        apply_routed_scaling_factor_on_output=True,
        num_expert_group=n_group,
        topk_group=topk_group,
    )
    expert = on_this_rank(expert, int(local_expert_offset), len(gemm1_weights), elsewhere=-1)
    x = dequantised_input(hidden_states, hidden_states_scale).bfloat16()
    weights = gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale
    return _fp8_blocks(x, *weights, (weight, expert))


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
) -> dict[str, torch.Tensor]:
    """moe_fused_gate by softmax, then the experts; shapes as in the definition -> output [seq_len, hidden_size]."""
    x = dequantised_input(hidden_states, hidden_states_scale).bfloat16()
    weights = gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale
    return _fp8_blocks(x, *weights, _renormalised(routing_logits, top_k))


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
    """moe_fused_gate by softmax, then fused_moe with a scale for each weight of an expert -> output."""
    scales = output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar
    routing = _renormalised(routing_logits, top_k)
    return _fp8_per_tensor(hidden_states, gemm1_weights, gemm2_weights, *scales, routing, on_input=False)


def trtllm_fp8_per_tensor_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    routing_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same with the best expert's sigmoid, which multiplies GEMM1's result; routing_bias is not used."""
    del routing_bias
    scales = output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar
    return _fp8_per_tensor(hidden_states, gemm1_weights, gemm2_weights, *scales, _best(routing_logits), on_input=True)


def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    *,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """moe_fused_gate by softmax, then fused_moe in bfloat16, in which the weights are the same numbers -> output."""
    routing = _renormalised(routing_logits, top_k)
    return _triton(hidden_states, in_bfloat16(gemm1_weights, gate_first), in_bfloat16(gemm2_weights), routing)


def trtllm_fp4_block_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    routing_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The same with the best expert's sigmoid, which multiplies GEMM1's result; routing_bias is not used."""
    del routing_bias
    weights = in_bfloat16(gemm1_weights, gate_first), in_bfloat16(gemm2_weights)
    return _triton(hidden_states, *weights, _best(routing_logits), on_input=True)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor, hidden_states: torch.Tensor, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """fused_moe in bfloat16, in which the weights are the same numbers, with the routing of topk_ids -> output."""
    expert, weight = unpacked(topk_ids)
    weights = in_bfloat16(gemm1_weights, gate_first), in_bfloat16(gemm2_weights)
    return _triton(hidden_states, *weights, (weight, expert))


def _renormalised(routing_logits: torch.Tensor, top_k: int) -> Routing:
    """The softmax over all logits, divided by the sum of the chosen, is the softmax over the chosen."""
    no_bias = torch.zeros(routing_logits.shape[1], device=routing_logits.device)
    weight, expert = moe_fused_gate(routing_logits, no_bias, top_k, scoring_func="softmax", renormalize=True)
    return weight, expert


def _best(routing_logits: torch.Tensor) -> Routing:
    """Ranked by the sigmoid: logits from 17 on tie, and the first of them is taken."""
    no_bias = torch.zeros(routing_logits.shape[1], device=routing_logits.device)
    weight, expert = moe_fused_gate(routing_logits, no_bias, 1, scoring_func="sigmoid", renormalize=False)
    return weight, expert


def _fp8_blocks(
    x: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm1_scale: torch.Tensor,
    gemm2_weights: torch.Tensor,
    gemm2_scale: torch.Tensor,
    routing: Routing,
) -> dict[str, torch.Tensor]:
    gemm1, scale1 = gate_first(gemm1_weights), gate_first(gemm1_scale)
    scales = {"w1_scale": scale1, "w2_scale": gemm2_scale, "block_shape": [BLOCK, BLOCK]}
    return _triton(x, gemm1, gemm2_weights, routing, use_fp8_w8a8=True, **scales)


def _fp8_per_tensor(
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    up_scale: torch.Tensor,
    gate_scale: torch.Tensor,
    down_scale: torch.Tensor,
    routing: Routing,
    *,
    on_input: bool,
) -> dict[str, torch.Tensor]:
    """fused_moe has one scale for gate and up, so what up has beyond the gate's goes to GEMM2, which is linear in it.

    The input's scale is in theirs already: as bfloat16 and of scale 1 the kernel rounds hidden_states to what they are.
    """
    scales = {"w1_scale": gate_scale, "w2_scale": down_scale * up_scale / gate_scale}
    one = torch.ones(1, device=hidden_states.device)
    x, gemm1 = hidden_states.bfloat16(), gate_first(gemm1_weights)
    return _triton(x, gemm1, gemm2_weights, routing, on_input=on_input, use_fp8_w8a8=True, a1_scale=one, **scales)


def _triton(
    x: torch.Tensor, gemm1: torch.Tensor, gemm2: torch.Tensor, routing: Routing, *, on_input: bool = False, **fp8: Any
) -> dict[str, torch.Tensor]:
    """fused_moe, for which an expert -1 is one of another rank; it wants [gate | up]."""
    _set_up()
    weight, expert = routing
    config = MoeRunnerConfig(inplace=False, apply_router_weight_on_input=on_input)
    chosen = StandardTopKOutput(weight, expert, weight)  # the logits in the third place are not looked at
    return {"output": fused_moe(x, gemm1, gemm2, chosen, config, **fp8)}


def _set_up() -> None:
    """fused_moe asks the process's server arguments for settings; without a server these are the defaults."""
    try:
        get_global_server_args()
    except ValueError:
        set_global_server_args_for_scheduler(ServerArgs(model_path="dummy"))

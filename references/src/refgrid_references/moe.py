"""Mixture of experts: each token goes through the few experts that its routing names, and their outputs are summed.

Experts that got tokens are taken one after the other, each with all its tokens at once. One batch for all of them would
need every expert's weights in float32, or a copy of an expert's weights for each of its tokens; this way a few rows of
one expert at a time are written out, and each product is as large as it can be.
"""

from collections.abc import Callable

import torch

from refgrid_references.blocks import block_elements

BLOCK_ROWS = 4096  # tokens of one expert that are multiplied at once: bounds what is between the two products


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
) -> torch.Tensor:
    """DeepSeek-V3's experts in fp8 blocks of 128, as flashinfer.fused_moe.trtllm_fp8_block_scale_moe.

    routing_logits [seq_len, num_experts] float32; routing_bias [num_experts] bfloat16; hidden_states [seq_len,
    hidden_size] float8_e4m3fn with hidden_states_scale [hidden_size / 128, seq_len] float32; gemm1_weights
    [num_local_experts, 2 * intermediate_size, hidden_size], gemm2_weights [num_local_experts, hidden_size,
    intermediate_size] float8_e4m3fn, their scales one a block of 128 x 128, float32
    -> output [seq_len, hidden_size] bfloat16. Only experts local_expert_offset, + 1, ... are here and add to it.
    """
    weight, expert = route_in_groups(routing_logits, routing_bias, n_group, topk_group, top_k)
    return mix_experts(
        weight * routed_scaling_factor,
        expert - local_expert_offset,
        lambda token: dequantise(rows_of(hidden_states, token), hidden_states_scale.T[token]),
        lambda x, e: project(x, gemm1_weights[e], gemm1_weights_scale[e]),
        lambda x, e: project(x, gemm2_weights[e], gemm2_weights_scale[e]),
        gemm2_weights.shape,
    )


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
) -> torch.Tensor:
    """Qwen3's experts in fp8 blocks of 128, as flashinfer.fused_moe.trtllm_fp8_block_scale_moe with Renormalize.

    routing_logits [seq_len, num_experts] bfloat16; the others as in moe_fp8_block_scale_ds_routing
    -> output [seq_len, hidden_size] bfloat16.
    """
    weight, expert = route_renormalised(routing_logits, top_k)
    return mix_experts(
        weight,
        expert,
        lambda token: dequantise(rows_of(hidden_states, token), hidden_states_scale.T[token]),
        lambda x, e: project(x, gemm1_weights[e], gemm1_weights_scale[e]),
        lambda x, e: project(x, gemm2_weights[e], gemm2_weights_scale[e]),
        gemm2_weights.shape,
    )


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
) -> torch.Tensor:
    """Experts in fp8 with one scale each, as flashinfer.fused_moe.trtllm_fp8_per_tensor_scale_moe with Renormalize.

    routing_logits [seq_len, num_experts] bfloat16; hidden_states [seq_len, hidden_size], gemm1_weights [num_experts,
    2 * intermediate_size, hidden_size], gemm2_weights [num_experts, hidden_size, intermediate_size] float8_e4m3fn;
    output1_scales_gate_scalar = scale of the input * scale of W1, output1_scales_scalar = that / scale of the
    intermediate, output2_scales_scalar = scale of the intermediate * scale of W2, each [num_experts] float32
    -> output [seq_len, hidden_size] bfloat16.
    """
    scale1 = torch.stack((output1_scales_scalar, output1_scales_gate_scalar), dim=1)  # of [up | gate]
    weight, expert = route_renormalised(routing_logits, top_k)
    return mix_experts(
        weight,
        expert,
        lambda token: widen(rows_of(hidden_states, token)),
        lambda x, e: project(x, gemm1_weights[e], scale1[e, :, None]),
        lambda x, e: project(x, gemm2_weights[e], output2_scales_scalar[e, None, None]),
        gemm2_weights.shape,
    )


def trtllm_fp8_per_tensor_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    output1_scales_scalar: torch.Tensor,
    output1_scales_gate_scalar: torch.Tensor,
    gemm2_weights: torch.Tensor,
    output2_scales_scalar: torch.Tensor,
    routing_bias: torch.Tensor,
) -> torch.Tensor:
    """As trtllm_fp8_per_tensor_scale_moe, but with the routing of Llama 4: one expert, its weight is on the input.

    routing_bias [num_experts] bfloat16 is part of the interface and not of the routing.
    """
    del routing_bias
    scale1 = torch.stack((output1_scales_scalar, output1_scales_gate_scalar), dim=1)  # of [up | gate]
    weight, expert = route_to_one(routing_logits)
    return mix_experts(
        torch.ones_like(weight),
        expert,
        lambda token: widen(rows_of(hidden_states, token)) * weight[token],
        lambda x, e: project(x, gemm1_weights[e], scale1[e, :, None]),
        lambda x, e: project(x, gemm2_weights[e], output2_scales_scalar[e, None, None]),
        gemm2_weights.shape,
    )


def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    *,
    top_k: int,
) -> torch.Tensor:
    """Experts with mxfp4 weights, as flashinfer.fused_moe.trtllm_fp4_block_scale_moe with Renormalize.

    routing_logits [seq_len, num_experts], hidden_states [seq_len, hidden_size] bfloat16; gemm1_weights [num_experts,
    2 * intermediate_size, hidden_size], gemm2_weights [num_experts, hidden_size, intermediate_size] float32, the
    numbers that the fp4 weights stand for -> output [seq_len, hidden_size] bfloat16.
    """
    weight, expert = route_renormalised(routing_logits, top_k)
    return mix_experts(
        weight,
        expert,
        lambda token: hidden_states[token].float(),
        lambda x, e: x @ gemm1_weights[e].T,
        lambda x, e: x @ gemm2_weights[e].T,
        gemm2_weights.shape,
    )


def trtllm_fp4_block_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    routing_bias: torch.Tensor,
) -> torch.Tensor:
    """As trtllm_fp4_block_scale_moe, but with the routing of Llama 4: one expert, its weight is on the input.

    routing_bias [num_experts] bfloat16 is part of the interface and not of the routing.
    """
    del routing_bias
    weight, expert = route_to_one(routing_logits)
    return mix_experts(
        torch.ones_like(weight),
        expert,
        lambda token: hidden_states[token].float() * weight[token],
        lambda x, e: x @ gemm1_weights[e].T,
        lambda x, e: x @ gemm2_weights[e].T,
        gemm2_weights.shape,
    )


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor, hidden_states: torch.Tensor, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor
) -> torch.Tensor:
    """As trtllm_fp4_block_scale_moe, but with a routing made before: trtllm_fp4_block_scale_routed_moe of FlashInfer.

    topk_ids [seq_len, top_k] int32: the expert's number in the upper 16 bits, in the lower 16 those of its weight as a
    bfloat16, which is used as it is.
    """
    weight = (topk_ids << 16).view(torch.float32)  # a bfloat16 is the upper half of a float32
    return mix_experts(
        weight,
        topk_ids.long() >> 16 & 0xFFFF,
        lambda token: hidden_states[token].float(),
        lambda x, e: x @ gemm1_weights[e].T,
        lambda x, e: x @ gemm2_weights[e].T,
        gemm2_weights.shape,
    )


def route_in_groups(
    logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeepSeek-V3's routing (https://arxiv.org/abs/2412.19437): the bias takes part in the choice, not in the weight.

    Experts lie in n_group groups; the topk_group groups with the largest sum of their two best stay in, and the top_k
    best of these are chosen. logits [T, num_experts], bias [num_experts] -> weight, expert [T, top_k].
    """
    s = logits.float().sigmoid()
    choice = (s + bias.float()).unflatten(1, (n_group, -1))  # [T, n_group, num_experts / n_group]
    group = choice.topk(2, dim=2).values.sum(dim=2).topk(topk_group, dim=1).indices
    out = torch.ones_like(choice[:, :, 0], dtype=torch.bool).scatter_(1, group, False)
    expert = choice.masked_fill(out[:, :, None], -torch.inf).flatten(1).topk(top_k, dim=1).indices
    weight = s.gather(1, expert)
    return weight / (weight.sum(dim=1, keepdim=True) + 1e-20), expert


def route_renormalised(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The top_k largest logits and the softmax over these: logits [T, num_experts] -> weight, expert [T, top_k]."""
    largest, expert = logits.float().topk(top_k, dim=1)
    return largest.softmax(dim=1), expert


def route_to_one(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest logit, and its sigmoid as the weight: logits [T, num_experts] -> weight, expert [T, 1]."""
    largest, expert = logits.float().topk(1, dim=1)
    return largest.sigmoid(), expert


def mix_experts(
    weight: torch.Tensor,
    expert: torch.Tensor,
    rows: Callable[[torch.Tensor], torch.Tensor],
    gemm1: Callable[[torch.Tensor, int], torch.Tensor],
    gemm2: Callable[[torch.Tensor, int], torch.Tensor],
    shape: torch.Size,
) -> torch.Tensor:
    """output[t] = sum over k of weight[t, k] * W2 (silu(gate) * up), [up | gate] = W1 x[t], W1, W2 of expert[t, k].

    weight, expert [T, top_k], a token's experts distinct; an expert outside [0, num_experts) adds nothing. rows: tokens
    [n] -> x [n, hidden_size]; gemm1, gemm2: x, expert -> W1 x [n, 2 * intermediate_size], W2 x [n, hidden_size]; all
    float32. shape = num_experts, hidden_size, intermediate_size -> [T, hidden_size] bfloat16.
    """
    by_expert, order = expert.flatten().sort(stable=True)
    token, weight = order // expert.shape[1], weight.flatten()[order, None]
    bounds = torch.searchsorted(by_expert, torch.arange(shape[0] + 1, device=expert.device)).tolist()
    output = weight.new_zeros(expert.shape[0], shape[1])
    for e in range(shape[0]):
        for begin in range(bounds[e], bounds[e + 1], BLOCK_ROWS):
            part = slice(begin, min(begin + BLOCK_ROWS, bounds[e + 1]))
            up, gate = gemm1(rows(token[part]), e).chunk(2, dim=1)
            y = gemm2(torch.nn.functional.silu(gate) * up, e)
            output.index_add_(0, token[part], y * weight[part])  # distinct tokens: no order of adding is left open
    return output.bfloat16()


def project(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x W^T, where W is written out a block of rows at a time.

    x [n, in] float32; w [out, in] float8; scale [out / a, in / b], one a block of a x b -> [n, out] float32.
    """
    scale = scale.repeat_interleave(w.shape[0] // scale.shape[0], dim=0)  # [out, in / b]
    count = max(1, block_elements(w.device) // (2 * w.shape[1]))  # as many bits, as int32, are looked up
    return torch.cat([x @ dequantise(*part).T for part in zip(w.split(count), scale.split(count), strict=True)], dim=1)


def dequantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows in float32: x [n, d] float8; scale [n, d / b], one a row and b of its values."""
    return (widen(x).unflatten(1, (scale.shape[1], -1)) * scale[:, :, None]).flatten(1)


def rows_of(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """x[index] of float8, taken by its bytes: before torch 2.10 a CPU takes no rows of this dtype."""
    return x.view(torch.uint8)[index].view(x.dtype)


def widen(x: torch.Tensor) -> torch.Tensor:
    """float8 as float32, looked up by its bits: on a CPU four times as fast as x.float(), which gives the same."""
    numbers = torch.arange(256, dtype=torch.uint8, device=x.device).view(x.dtype).float()
    return numbers.index_select(0, x.view(torch.uint8).flatten().int()).view(x.shape)

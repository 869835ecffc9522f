"""Mixtures of experts token by token and expert by expert, straight from their definitions; float64 by default."""

from __future__ import annotations

import math
import struct

import torch
from torch import Tensor

Route = list[tuple[int, float]]  # experts of one token, with their weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def deepseek_route(logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, factor: float) -> Route:
    """logits, bias [num_experts]: of the best groups the best experts; the bias chooses only."""
    score = [sigmoid(float(x)) for x in logits]
    biased = [s + float(b) for s, b in zip(score, bias, strict=True)]
    size = len(score) // n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(n_group)]
    groups.sort(key=lambda group: sum(sorted(biased[e] for e in group)[-2:]), reverse=True)
    allowed = [e for group in groups[:topk_group] for e in group]
    chosen = sorted(allowed, key=lambda e: biased[e], reverse=True)[:top_k]
    total = sum(score[e] for e in chosen) + 1e-20
    return [(e, score[e] / total * factor) for e in chosen]


def renormalised_route(logits: Tensor, top_k: int) -> Route:
    """logits [num_experts]: the largest, and the softmax over them."""
    z = [float(x) for x in logits]
    chosen = sorted(range(len(z)), key=lambda e: z[e], reverse=True)[:top_k]
    total = sum(math.exp(z[e] - z[chosen[0]]) for e in chosen)
    return [(e, math.exp(z[e] - z[chosen[0]]) / total) for e in chosen]


def single_route(logits: Tensor) -> Route:
    """logits [num_experts]: the largest and its sigmoid."""
    z = [float(x) for x in logits]
    best = max(range(len(z)), key=lambda e: z[e])
    return [(best, sigmoid(z[best]))]


def packed_route(ids: Tensor) -> Route:
    """ids [top_k] int32: bytes of a bfloat16 below those of the expert's number."""
    route = []
    for packed in ids.tolist():
        low, high = struct.unpack("<HH", struct.pack("<i", packed))
        route.append((high, struct.unpack("<f", struct.pack("<HH", 0, low))[0]))
    return route


def dequantised(w: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """w [out, in] with a scale [out / 128, in / 128] for each block, one block after the other."""
    result = w.to(dtype)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            result[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] *= scale[i, j].to(dtype)
    return result


def expert(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """W2 (silu(gate) * up), [up | gate] = W1 x: x [hidden_size], w1 [2 * intermediate_size, hidden_size]."""
    up, gate = (w1 @ x).split(len(w1) // 2)
    return w2 @ (gate / (1 + torch.exp(-gate)) * up)


def _sum(parts: list[Tensor], like: Tensor) -> Tensor:
    total = torch.zeros_like(like)
    for part in parts:
        total = total + part
    return total


def moe_fp8_block_scale_ds_routing(
    routing_logits: Tensor,
    routing_bias: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    local_expert_offset: int,
    routed_scaling_factor: float,
    *,
    n_group: int,
    topk_group: int,
    top_k: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    for t, logits in enumerate(routing_logits):
        x = dequantised(hidden_states[t, None], hidden_states_scale[:, t][None], dtype)[0]
        parts = []
        for e, weight in deepseek_route(logits, routing_bias, n_group, topk_group, top_k, routed_scaling_factor):
            here = e - local_expert_offset
            if 0 <= here < len(gemm1_weights):
                w1 = dequantised(gemm1_weights[here], gemm1_weights_scale[here], dtype)
                w2 = dequantised(gemm2_weights[here], gemm2_weights_scale[here], dtype)
                parts.append(weight * expert(x, w1, w2))
        rows.append(_sum(parts, x))
    return torch.stack(rows)


def moe_fp8_block_scale_renorm(
    routing_logits: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    *,
    top_k: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    for t, logits in enumerate(routing_logits):
        x = dequantised(hidden_states[t, None], hidden_states_scale[:, t][None], dtype)[0]
        parts = []
        for e, weight in renormalised_route(logits, top_k):
            w1 = dequantised(gemm1_weights[e], gemm1_weights_scale[e], dtype)
            w2 = dequantised(gemm2_weights[e], gemm2_weights_scale[e], dtype)
            parts.append(weight * expert(x, w1, w2))
        rows.append(_sum(parts, x))
    return torch.stack(rows)


def _per_tensor(
    w1: Tensor, up: Tensor, gate: Tensor, w2: Tensor, down: Tensor, e: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    first, second = w1[e].to(dtype), w2[e].to(dtype)
    half = len(first) // 2
    first[:half] *= up[e].to(dtype)
    first[half:] *= gate[e].to(dtype)
    return first, second * down[e].to(dtype)


def trtllm_fp8_per_tensor_scale_moe(
    routing_logits: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    output1_scales_scalar: Tensor,
    output1_scales_gate_scalar: Tensor,
    gemm2_weights: Tensor,
    output2_scales_scalar: Tensor,
    *,
    top_k: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    scales = output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar
    for t, logits in enumerate(routing_logits):
        x = hidden_states[t].to(dtype)
        route = renormalised_route(logits, top_k)
        rows.append(_sum([w * expert(x, *_per_tensor(gemm1_weights, *scales, e, dtype)) for e, w in route], x))
    return torch.stack(rows)


def trtllm_fp8_per_tensor_scale_moe_topk1(
    routing_logits: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    output1_scales_scalar: Tensor,
    output1_scales_gate_scalar: Tensor,
    gemm2_weights: Tensor,
    output2_scales_scalar: Tensor,
    routing_bias: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    del routing_bias
    rows = []
    scales = output1_scales_scalar, output1_scales_gate_scalar, gemm2_weights, output2_scales_scalar
    for t, logits in enumerate(routing_logits):
        [(e, weight)] = single_route(logits)
        rows.append(expert(weight * hidden_states[t].to(dtype), *_per_tensor(gemm1_weights, *scales, e, dtype)))
    return torch.stack(rows)


def trtllm_fp4_block_scale_moe(
    routing_logits: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    *,
    top_k: int,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    for t, logits in enumerate(routing_logits):
        x, route = hidden_states[t].to(dtype), renormalised_route(logits, top_k)
        rows.append(_sum([w * expert(x, gemm1_weights[e].to(dtype), gemm2_weights[e].to(dtype)) for e, w in route], x))
    return torch.stack(rows)


def trtllm_fp4_block_scale_moe_topk1(
    routing_logits: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    routing_bias: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    del routing_bias
    rows = []
    for t, logits in enumerate(routing_logits):
        [(e, weight)] = single_route(logits)
        x = weight * hidden_states[t].to(dtype)
        rows.append(expert(x, gemm1_weights[e].to(dtype), gemm2_weights[e].to(dtype)))
    return torch.stack(rows)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: Tensor,
    hidden_states: Tensor,
    gemm1_weights: Tensor,
    gemm2_weights: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    rows = []
    for t, ids in enumerate(topk_ids):
        x, route = hidden_states[t].to(dtype), packed_route(ids)
        rows.append(_sum([w * expert(x, gemm1_weights[e].to(dtype), gemm2_weights[e].to(dtype)) for e, w in route], x))
    return torch.stack(rows)

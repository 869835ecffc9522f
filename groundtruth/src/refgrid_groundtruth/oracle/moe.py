"""Mixtures of experts in float64: a dense table of weights, token by expert, and products block by block.

An expert takes the rows of the table's column that are not zero. Numbers stay as they are stored until a block's
product is there, and the scales multiply that, as tensor cores do it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    Product = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # expert, tokens, their input -> output


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
    """The columns of the experts that are here, of the table over all experts."""
    table = deepseek_table(routing_logits, routing_bias, n_group, topk_group, top_k) * float(routed_scaling_factor)
    here = table[:, int(local_expert_offset) : int(local_expert_offset) + gemm1_weights.shape[0]]
    scales = hidden_states_scale, gemm1_weights_scale, gemm2_weights_scale
    return _block_scaled(here, hidden_states, gemm1_weights, gemm2_weights, *scales)


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
    """Softmax over the chosen; scales on the products of blocks."""
    scales = hidden_states_scale, gemm1_weights_scale, gemm2_weights_scale
    return _block_scaled(
        renormalised_table(routing_logits, top_k), hidden_states, gemm1_weights, gemm2_weights, *scales
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
) -> dict[str, torch.Tensor]:
    """Softmax over the chosen; scales on whole products."""
    scales = output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar
    return _scaled(renormalised_table(routing_logits, top_k), hidden_states, gemm1_weights, gemm2_weights, *scales)


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
    """Sigmoid of the largest logit on what GEMM1 gives, which is linear in its input."""
    del routing_bias
    table, scales = sigmoid_table(routing_logits), (output1_scales_scalar, output1_scales_gate_scalar)
    return _scaled(
        table, hidden_states, gemm1_weights, gemm2_weights, *scales, output2_scales_scalar, weight_on_input=True
    )


def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    *,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """Softmax over the chosen; the weights' numbers as they are."""
    return _unscaled(renormalised_table(routing_logits, top_k), hidden_states, gemm1_weights, gemm2_weights)


def trtllm_fp4_block_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    routing_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Sigmoid of the largest logit on what GEMM1 gives; the weights' numbers as they are."""
    del routing_bias
    table = sigmoid_table(routing_logits)
    return _unscaled(table, hidden_states, gemm1_weights, gemm2_weights, weight_on_input=True)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor, hidden_states: torch.Tensor, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A packed number read as two of 16 bits: the weight's bits come first on every machine that torch runs on."""
    halves = topk_ids.contiguous().view(torch.int16).unflatten(1, (-1, 2))
    expert, weight = halves[:, :, 1].long(), halves[:, :, 0].contiguous().view(torch.bfloat16).double()
    table = weight.new_zeros(len(topk_ids), gemm1_weights.shape[0]).scatter_add(1, expert, weight)
    return _unscaled(table, hidden_states, gemm1_weights, gemm2_weights)


def deepseek_table(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int) -> torch.Tensor:
    """Weights [T, num_experts] float64, 0 where not chosen: sigmoids that biased reach the cut in groups that do."""
    score = 1 / (1 + torch.exp(-logits.double()))
    biased = score + bias.double()
    in_groups = biased.reshape(len(biased), n_group, -1)
    pair = in_groups.sort(dim=2).values[:, :, -2:].sum(dim=2)
    stays = pair >= pair.sort(dim=1).values[:, -topk_group, None]
    allowed = in_groups.where(stays[:, :, None], -torch.inf).reshape(biased.shape)
    chosen = score * (allowed >= allowed.sort(dim=1).values[:, -top_k, None])
    return chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)


def renormalised_table(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Weights [T, num_experts] float64, 0 where not chosen: e^logit of those that reach the cut, of sum one."""
    z = logits.double()
    power = torch.exp(z - z.amax(dim=1, keepdim=True)) * (z >= z.sort(dim=1).values[:, -top_k, None])
    return power / power.sum(dim=1, keepdim=True)


def sigmoid_table(logits: torch.Tensor) -> torch.Tensor:
    """Weights [T, num_experts] float64, 0 but for the largest logit: its sigmoid."""
    z = logits.double()
    return 1 / (1 + torch.exp(-z)) * (z == z.amax(dim=1, keepdim=True))


def _block_scaled(
    table: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    x_scale: torch.Tensor,
    w1_scale: torch.Tensor,
    w2_scale: torch.Tensor,
) -> dict[str, torch.Tensor]:
    def first(expert: int, token: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return _product(given, x_scale[:, token].double(), w1[expert], w1_scale[expert].double())

    def second(expert: int, token: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        ones = given.new_ones(w2_scale.shape[2], len(token))
        return _product(given, ones, w2[expert], w2_scale[expert].double())

    return _mixture(table, x, first, second)


def _scaled(
    table: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    down: torch.Tensor,
    *,
    weight_on_input: bool = False,
) -> dict[str, torch.Tensor]:
    def first(expert: int, _: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        up_part, gate_part = (given @ w1[expert].double().T).tensor_split(2, dim=1)
        return torch.cat((up_part * up[expert].double(), gate_part * gate[expert].double()), dim=1)

    def second(expert: int, _: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return given @ w2[expert].double().T * down[expert].double()

    return _mixture(table, x, first, second, weight_on_input=weight_on_input)


def _unscaled(
    table: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, *, weight_on_input: bool = False
) -> dict[str, torch.Tensor]:
    def first(expert: int, _: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return given @ w1[expert].double().T

    def second(expert: int, _: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return given @ w2[expert].double().T

    return _mixture(table, x, first, second, weight_on_input=weight_on_input)


def _product(x: torch.Tensor, x_scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> torch.Tensor:
    """x [n, in]; x_scale [in / b, n]; w [out, in]; w_scale [out / a, in / b] -> [n, out], summed block by block."""
    wide, tall = x.shape[1] // w_scale.shape[1], w.shape[0] // w_scale.shape[0]
    total = x.new_zeros(len(x), w.shape[0])
    for block in range(w_scale.shape[1]):
        columns = slice(block * wide, (block + 1) * wide)
        part = x[:, columns] @ w[:, columns].double().T
        total += part * x_scale[block, :, None] * w_scale[:, block].repeat_interleave(tall)
    return total


def _mixture(
    table: torch.Tensor, x: torch.Tensor, first: Product, second: Product, *, weight_on_input: bool = False
) -> dict[str, torch.Tensor]:
    """table [T, experts] float64; x [T, hidden_size] as stored -> output [T, hidden_size] bfloat16."""
    output = table.new_zeros(x.shape)
    for expert, column in enumerate(table.T):
        token = column.nonzero().squeeze(1)
        if not len(token):
            continue
        weight = column[token, None]
        up, gate = first(expert, token, x[token].double()).mul(weight if weight_on_input else 1).tensor_split(2, dim=1)
        result = second(expert, token, up * gate / (1 + torch.exp(-gate)))
        output[token] += result if weight_on_input else result * weight
    return {"output": output.bfloat16()}

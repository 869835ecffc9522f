"""Mixtures of experts by the modules of DeepSeek-V3, Qwen3-MoE and Llama 4, run with transformers 5.23.0 and 5.12.1.

The modules work in float32, for which an expert's weights are written out when the module asks for them: all experts of
a layer at once would be up to 68 GB. A router computes its logits from the hidden states; to route by given logits it
gets those as its hidden states, and the identity as its weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import DeepseekV3Config, Llama4TextConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.llama4 import modeling_llama4
from transformers.models.qwen3_moe import modeling_qwen3_moe

from refgrid_groundtruth.experts import dequantised, dequantised_input, gate_first, on_this_rank, unpacked

if TYPE_CHECKING:
    from collections.abc import Callable

    Expert = Callable[[int], torch.Tensor]  # an expert's number to its float32 weight
    Routing = tuple[torch.Tensor, torch.Tensor]  # expert numbers and weights, [seq_len, top_k] each


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
    """The gate of DeepseekV3MoE, then its experts; shapes as in the definition -> output [seq_len, hidden_size].

    The experts that other ranks hold are one expert of weight zero.
    """
    routing = _deepseek_routing(
        routing_logits,
        routing_bias,
        n_group=n_group,
        topk_group=topk_group,
        num_experts_per_tok=top_k,
        routed_scaling_factor=float(routed_scaling_factor),
    )
    count, hidden_size, intermediate_size = gemm2_weights.shape
    routing = on_this_rank(routing[0], int(local_expert_offset), count, elsewhere=count), routing[1]
    sizes = {"hidden_size": hidden_size, "moe_intermediate_size": intermediate_size}
    config = DeepseekV3Config(n_routed_experts=count + 1, experts_implementation="eager", **sizes)
    with torch.device("meta"):
        experts = modeling_deepseek_v3.DeepseekV3MoE(config).experts
    x = dequantised_input(hidden_states, hidden_states_scale)
    weights = _fp8(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    return _mixture(experts, x, _with_an_idle_expert(weights, gemm2_weights.shape, x), routing)


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
    """Qwen3MoeTopKRouter and Qwen3MoeExperts; shapes as in the definition -> output [seq_len, hidden_size].

    The router divides the softmax over all logits by the sum of what it chose, which is the softmax over the chosen.
    """
    x = dequantised_input(hidden_states, hidden_states_scale)
    weights = _fp8(gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale)
    return _qwen3(x, weights, gemm2_weights.shape, _qwen3_routing(routing_logits, top_k))


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
    """As moe_fp8_block_scale_renorm, with an expert's three scales for its up, gate and second projection."""
    scales = output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar
    weights = _fp8_per_tensor(gemm1_weights, gemm2_weights, *scales)
    return _qwen3(hidden_states.float(), weights, gemm2_weights.shape, _qwen3_routing(routing_logits, top_k))


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
    """Llama4Router and Llama4TextMoe, whose sigmoid weight multiplies the input; routing_bias is not used."""
    del routing_bias
    scales = output1_scales_scalar, output1_scales_gate_scalar, output2_scales_scalar
    weights = _fp8_per_tensor(gemm1_weights, gemm2_weights, *scales)
    return _llama4(routing_logits, hidden_states.float(), weights, gemm2_weights.shape)


def trtllm_fp4_block_scale_moe(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    *,
    top_k: int,
) -> dict[str, torch.Tensor]:
    """As moe_fp8_block_scale_renorm, with bfloat16 hidden_states and float32 weights."""
    routing = _qwen3_routing(routing_logits, top_k)
    return _qwen3(hidden_states.float(), _float32(gemm1_weights, gemm2_weights), gemm2_weights.shape, routing)


def trtllm_fp4_block_scale_moe_topk1(
    routing_logits: torch.Tensor,
    hidden_states: torch.Tensor,
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    routing_bias: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """As trtllm_fp8_per_tensor_scale_moe_topk1, with bfloat16 hidden_states and float32 weights."""
    del routing_bias
    weights = _float32(gemm1_weights, gemm2_weights)
    return _llama4(routing_logits, hidden_states.float(), weights, gemm2_weights.shape)


def trtllm_fp4_block_scale_routed_moe(
    topk_ids: torch.Tensor, hidden_states: torch.Tensor, gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Qwen3MoeExperts with the routing that topk_ids holds, whose weights are used as they are."""
    expert, weight = unpacked(topk_ids)
    weights = _float32(gemm1_weights, gemm2_weights)
    return _qwen3(hidden_states.float(), weights, gemm2_weights.shape, (expert.long(), weight))


def _deepseek_routing(routing_logits: torch.Tensor, routing_bias: torch.Tensor, **options: float) -> Routing:
    """DeepseekV3TopkRouter; before it chose experts itself, DeepseekV3MoE did."""
    count = routing_logits.shape[1]
    config = DeepseekV3Config(
        hidden_size=count, n_routed_experts=count, moe_intermediate_size=1, norm_topk_prob=True, **options
    )
    with routing_logits.device:
        block = modeling_deepseek_v3.DeepseekV3MoE(config)
    block.gate.weight = _identity(routing_logits)
    block.gate.e_score_correction_bias = routing_bias.float()
    routed = block.gate(routing_logits.float())
    if isinstance(routed, tuple):
        return routed[2], routed[1]
    expert, weight = block.route_tokens_to_experts(routed)
    return expert, weight


def _qwen3_routing(routing_logits: torch.Tensor, top_k: int) -> Routing:
    count = routing_logits.shape[1]
    config = Qwen3MoeConfig(hidden_size=count, num_experts=count, num_experts_per_tok=top_k, norm_topk_prob=True)
    router = modeling_qwen3_moe.Qwen3MoeTopKRouter(config)
    router.weight = _identity(routing_logits)
    _, weight, expert = router(routing_logits.float())
    return expert, weight


def _llama4_routing(routing_logits: torch.Tensor) -> Routing:
    count = routing_logits.shape[1]
    config = Llama4TextConfig(hidden_size=count, num_local_experts=count, num_experts_per_tok=1)
    router = modeling_llama4.Llama4Router(config)
    router.weight = _identity(routing_logits)
    scores, _ = router(routing_logits.float())  # 0 but for the expert chosen
    weight, expert = scores.max(dim=1)
    return expert, weight


def _identity(routing_logits: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.eye(routing_logits.shape[1], device=routing_logits.device), requires_grad=False)


def _qwen3(
    x: torch.Tensor, weights: tuple[Expert, Expert], shape: torch.Size, routing: Routing
) -> dict[str, torch.Tensor]:
    count, hidden_size, intermediate_size = shape
    sizes = {"hidden_size": hidden_size, "moe_intermediate_size": intermediate_size}
    config = Qwen3MoeConfig(num_experts=count, experts_implementation="eager", **sizes)
    with torch.device("meta"):
        experts = modeling_qwen3_moe.Qwen3MoeExperts(config)
    return _mixture(experts, x, weights, routing)


def _mixture(
    experts: torch.nn.Module, x: torch.Tensor, weights: tuple[Expert, Expert], routing: Routing
) -> dict[str, torch.Tensor]:
    """The module's eager forward, which takes its weights expert by expert."""
    for name, weight in zip(("gate_up_proj", "down_proj"), weights, strict=True):
        delattr(experts, name)
        setattr(experts, name, _Weights(weight))
    return {"output": experts(x, *routing).bfloat16()}


def _llama4(
    routing_logits: torch.Tensor, x: torch.Tensor, weights: tuple[Expert, Expert], shape: torch.Size
) -> dict[str, torch.Tensor]:
    """Llama4TextMoe sends every token through every expert, with weight 0 but for one: here each through that one.

    So for each expert a block that has only it, over the tokens that chose it, with the scores of the router.
    """
    expert, weight = _llama4_routing(routing_logits)
    _, hidden_size, intermediate_size = shape
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size}
    with torch.device("meta"):
        block = modeling_llama4.Llama4TextMoe(Llama4TextConfig(num_local_experts=1, num_experts_per_tok=1, **sizes))
    block.shared_expert = _Nothing()
    output = torch.empty_like(x)
    for number in expert.unique().tolist():
        chosen = expert == number
        block.router = _Scores(weight[chosen, None])
        for name, of in zip(("gate_up_proj", "down_proj"), weights, strict=True):
            setattr(block.experts, name, torch.nn.Parameter(of(number).t()[None], requires_grad=False))
        output[chosen], _ = block(x[chosen])
    return {"output": output.bfloat16()}


class _Nothing(torch.nn.Module):
    """In the place of the shared expert, which the definitions do not have."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(hidden_states)


class _Scores(torch.nn.Module):
    """In the place of the router: what it gave for these tokens and their expert, [tokens, 1]."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The scores, and no logits."""
        return self.scores, None


class _Weights:
    """In the place of a parameter [num_experts, ...]: an expert's weight is written out when it is asked for."""

    def __init__(self, of: Expert) -> None:
        self.of = of

    def __getitem__(self, expert: torch.Tensor) -> torch.Tensor:
        return self.of(int(expert))


def _fp8(w1: torch.Tensor, scale1: torch.Tensor, w2: torch.Tensor, scale2: torch.Tensor) -> tuple[Expert, Expert]:
    return lambda e: gate_first(dequantised(w1[e], scale1[e])), lambda e: dequantised(w2[e], scale2[e])


def _fp8_per_tensor(
    gemm1_weights: torch.Tensor,
    gemm2_weights: torch.Tensor,
    up_scale: torch.Tensor,
    gate_scale: torch.Tensor,
    down_scale: torch.Tensor,
) -> tuple[Expert, Expert]:
    def gate_up(expert: int) -> torch.Tensor:
        up, gate = gemm1_weights[expert].float().chunk(2)
        return torch.cat((gate * gate_scale[expert], up * up_scale[expert]))

    return gate_up, lambda expert: gemm2_weights[expert].float() * down_scale[expert]


def _float32(gemm1_weights: torch.Tensor, gemm2_weights: torch.Tensor) -> tuple[Expert, Expert]:
    return lambda expert: gate_first(gemm1_weights[expert]), lambda expert: gemm2_weights[expert]


def _with_an_idle_expert(
    weights: tuple[Expert, Expert], shape: torch.Size, like: torch.Tensor
) -> tuple[Expert, Expert]:
    """One expert more, of weight zero and, since that is enough, one unit wide."""
    gate_up, down = weights
    count, hidden_size, _ = shape
    return (
        lambda expert: gate_up(expert) if expert < count else like.new_zeros(2, hidden_size),
        lambda expert: down(expert) if expert < count else like.new_zeros(hidden_size, 1),
    )

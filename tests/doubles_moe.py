"""Doubles of the functions of FlashInfer and SGLang that mixtures of experts call: they take what the libraries take.

They answer in float32 loops, and assert what the libraries demand of their arguments.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NamedTuple

import naive_moe
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
SIGMOID, SOFTMAX = "sigmoid", "softmax"
called: dict[str, Any] = {}  # what the latest call of a function got


def wide(weights: Tensor, scale: Tensor) -> Tensor:
    return torch.stack([naive_moe.dequantised(w, s, torch.float32) for w, s in zip(weights, scale, strict=True)])


def mixed(
    x: Tensor, w1: Tensor, w2: Tensor, weight: Tensor, expert: Tensor, *, up_first: bool = False, on_input: bool = False
) -> Tensor:
    """GEMM1 [gate | up] or, with up_first, [up | gate]; an expert without weights here adds nothing."""
    output = torch.zeros(len(x), w2.shape[1])
    for token, slot in (expert >= 0).nonzero().tolist():
        e, factor = int(expert[token, slot]), weight[token, slot]
        if e < len(w1):
            halves = (w1[e].float() @ x[token].float()).mul(factor if on_input else 1).chunk(2)
            up, gate = halves if up_first else halves[::-1]
            result = w2[e].float() @ (torch.nn.functional.silu(gate) * up)
            output[token] += result if on_input else factor * result
    return output.bfloat16()


def deepseek(
    scores: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Weights and expert numbers, [tokens, top_k]."""
    routes = [naive_moe.deepseek_route(row, bias, n_group, topk_group, top_k, factor) for row in scores]
    weight = torch.tensor([[w for _, w in route] for route in routes])
    return weight, torch.tensor([[e for e, _ in route] for route in routes], dtype=torch.int32)


class OlderBlock:
    """As DeepseekV3MoE of transformers was up to 5.12: the gate gives logits, and the block chooses."""

    def __init__(self, config: Any) -> None:
        self.config, self.gate = config, torch.nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)

    def route_tokens_to_experts(self, router_logits: Tensor) -> tuple[Tensor, Tensor]:
        of, bias = self.config, self.gate.e_score_correction_bias
        groups = of.n_group, of.topk_group, of.num_experts_per_tok, of.routed_scaling_factor
        weight, expert = deepseek(router_logits, bias, *groups)
        return expert, weight


def moe_fused_gate(
    scores: Tensor,
    bias: Tensor,
    topk: int,
    scoring_func: str = SIGMOID,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    num_expert_group: int = 1,
    topk_group: int = 1,
) -> tuple[Tensor, Tensor]:
    assert bias.dtype == torch.float32, "bias must be float32"
    assert (scores.ndim, bias.shape) == (2, scores.shape[1:])
    if scoring_func == SIGMOID and renormalize:
        factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else 1.0
        return deepseek(scores, bias, num_expert_group, topk_group, topk, factor)
    score = scores.float().softmax(1) if scoring_func == SOFTMAX else scores.float().sigmoid()
    weight, expert = score.topk(topk, dim=1)
    return weight / weight.sum(1, keepdim=True) if renormalize else weight, expert.int()


def fused_moe(
    hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_output: Any, moe_runner_config: Any, **fp8: Any
) -> Tensor:
    called["fused_moe"] = SimpleNamespace(config=moe_runner_config, w1=w1, **fp8)
    weight, expert, _ = topk_output
    assert (weight.dtype, expert.dtype) == (torch.float32, torch.int32)
    assert hidden_states.dtype == torch.bfloat16
    assert all(tensor.is_contiguous() for tensor in (hidden_states, w1, w2, weight, expert))
    if fp8.get("block_shape"):
        w1, w2 = wide(w1, fp8["w1_scale"]), wide(w2, fp8["w2_scale"])
    elif fp8:
        assert fp8["a1_scale"].tolist() == [1.0]
        w1, w2 = (w.float() * fp8[f"w{n}_scale"][:, None, None] for n, w in ((1, w1), (2, w2)))
    else:
        assert w1.dtype == w2.dtype == torch.bfloat16
    return mixed(hidden_states, w1, w2, weight, expert, on_input=moe_runner_config.apply_router_weight_on_input)


def cutlass_fused_moe(
    input: Tensor,  # noqa: A002 - the library's name
    token_selected_experts: Tensor,
    token_final_scales: Tensor,
    fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor,
    output_dtype: torch.dtype,
    quant_scales: list[Tensor] | None,
    output: Tensor,
    ep_size: int = 1,
    use_deepseek_fp8_block_scale: bool = False,
) -> list[Tensor]:
    called["cutlass_fused_moe"] = SimpleNamespace(ep_size=ep_size, quant_scales=quant_scales)
    assert (token_selected_experts.dtype, token_final_scales.dtype) == (torch.int32, torch.float32)
    assert output_dtype == torch.bfloat16
    assert int(token_selected_experts.max()) < len(fc1_expert_weights) * ep_size
    w1, w2 = fc1_expert_weights, fc2_expert_weights
    if use_deepseek_fp8_block_scale:
        assert quant_scales
        assert input.dtype == torch.bfloat16
        w1, w2 = wide(w1, quant_scales[0]), wide(w2, quant_scales[1])
    elif quant_scales:
        first, inner, second, of_input = quant_scales
        assert (input.dtype, of_input.shape) == (FP8, ())
        w1, w2 = w1.float() * first[:, None, None], w2.float() * (inner * second)[:, None, None]
    else:
        assert w1.dtype == w2.dtype == input.dtype == torch.bfloat16
    output.copy_(mixed(input, w1, w2, token_final_scales, token_selected_experts, up_first=True))
    return [output]


def fused_topk_deepseek(
    scores: Tensor,
    bias: Tensor,
    n_group: int,
    topk_group: int,
    topk: int,
    routed_scaling_factor: float,
    topk_values: Tensor,
    topk_indices: Tensor,
) -> None:
    if topk_group * n_group < topk:
        raise ValueError(f"Invalid configuration: topk_group * n_group must be >= topk ({topk})")
    assert scores.dtype == bias.dtype == topk_values.dtype == torch.float32
    weight, expert = deepseek(scores, bias, n_group, topk_group, topk, routed_scaling_factor)
    topk_values.copy_(weight)
    topk_indices.copy_(expert)


def trtllm_fp8_block_scale_moe(
    routing_logits: Tensor,
    routing_bias: Tensor | None,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    num_experts: int,
    top_k: int,
    n_group: int | None,
    topk_group: int | None,
    intermediate_size: int,
    local_expert_offset: int,
    local_num_experts: int,
    routed_scaling_factor: float | None,
    routing_method_type: int,
    use_shuffled_weight: bool,
) -> Tensor:
    assert not use_shuffled_weight
    assert (routing_logits.shape[1], *gemm2_weights.shape[::2]) == (num_experts, local_num_experts, intermediate_size)
    given = hidden_states, hidden_states_scale, gemm1_weights, gemm1_weights_scale, gemm2_weights, gemm2_weights_scale
    if routing_method_type == 1:
        assert routing_logits.dtype == torch.bfloat16
        assert (routing_bias, n_group, topk_group, routed_scaling_factor) == (None,) * 4
        return naive_moe.moe_fp8_block_scale_renorm(routing_logits, *given, top_k=top_k).bfloat16()
    assert routing_method_type == 2
    assert routing_logits.dtype == torch.float32
    assert routing_bias is not None
    assert n_group
    assert topk_group
    assert routed_scaling_factor
    return naive_moe.moe_fp8_block_scale_ds_routing(
        *(routing_logits, routing_bias, *given, local_expert_offset, routed_scaling_factor),
        n_group=n_group,
        topk_group=topk_group,
        top_k=top_k,
    ).bfloat16()


@dataclasses.dataclass
class MoeRunnerConfig:
    inplace: bool = True
    apply_router_weight_on_input: bool = False


class StandardTopKOutput(NamedTuple):
    topk_weights: Tensor
    topk_ids: Tensor
    router_logits: Tensor


class ServerArgs:
    """SGLang's settings of the process: asked for before they are published, they raise."""

    published: ServerArgs | None = None

    def __init__(self, model_path: str) -> None:
        self.model_path = model_path

    @classmethod
    def get(cls) -> ServerArgs:
        if cls.published is None:
            raise ValueError("Global server args is not set yet!")
        return cls.published

    def publish(self) -> None:
        type(self).published = self


_SGLANG_MOE = "sglang.srt.layers.moe"
MODULES: dict[str, dict[str, Any]] = {
    "flashinfer": {"top_k": torch.topk},
    "flashinfer.fused_moe": {
        "cutlass_fused_moe": cutlass_fused_moe,
        "fused_topk_deepseek": fused_topk_deepseek,
        "trtllm_fp8_block_scale_moe": trtllm_fp8_block_scale_moe,
    },
    "flashinfer.sampling": {"softmax": lambda logits: logits.softmax(1)},
    "sglang.jit_kernel.moe_fused_gate": {"moe_fused_gate": moe_fused_gate},
    f"{_SGLANG_MOE}.moe_runner": {"MoeRunnerConfig": MoeRunnerConfig},
    f"{_SGLANG_MOE}.moe_runner.triton_utils.fused_moe": {"fused_moe": fused_moe},
    f"{_SGLANG_MOE}.topk": {"StandardTopKOutput": StandardTopKOutput},
    "sglang.srt.server_args": {
        "ServerArgs": ServerArgs,
        "get_global_server_args": ServerArgs.get,
        "set_global_server_args_for_scheduler": ServerArgs.publish,
    },
}

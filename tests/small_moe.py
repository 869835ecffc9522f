"""The published mixtures of experts with few and small experts: names, text, tags and constraints as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from refgrid.dataset.definition import DataSet, Definition, InputSpec, Workload, read_definition

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 128,
    "gemm1_out_size": 256,
    "num_hidden_blocks": 2,
    "num_intermediate_blocks": 1,
    "num_gemm1_out_blocks": 2,
    "num_experts": 32,
    "num_local_experts": 12,
}

GROUPS = "moe_fp8_block_scale_ds_routing_topk8_ng8_kg4_e32_h7168_i2048"
NO_GROUPS = "moe_fp8_block_scale_ds_routing_topk8_ng1_kg1_e48_h7168_i2048"
RENORM = "moe_fp8_block_scale_renorm_topk10_e128_h2048_i512"
PER_TENSOR = "trtllm_fp8_per_tensor_scale_moe_topk8_e128_h2048_i768"
PER_TENSOR_ONE = "trtllm_fp8_per_tensor_scale_moe_topk1_e16_h5120_i8192"
FP4 = "trtllm_fp4_block_scale_moe_topk8_e128_h2048_i768"
FP4_ONE = "trtllm_fp4_block_scale_moe_topk1_e16_h5120_i8192"
ROUTED = "trtllm_fp4_block_scale_routed_moe_topk10_e128_h2048_i512"
ROUTED_ONE = "trtllm_fp4_block_scale_routed_moe_topk1_e16_h5120_i8192"
NAMES = (GROUPS, NO_GROUPS, RENORM, PER_TENSOR, PER_TENSOR_ONE, FP4, FP4_ONE, ROUTED, ROUTED_ONE)


def definition(name: str, **sizes: int) -> Definition:
    """A published definition with the const axes of `sizes`, or those of SIZES."""
    published = read_definition(ROOT / f"definitions/moe/{name}.json")
    new = {axis: value for axis, value in {**SIZES, **sizes}.items() if axis in published.axes}
    shrunk = {axis: replace(published.axes[axis], value=value) for axis, value in new.items()}
    return replace(published, axes={**published.axes, **shrunk})


def workload(of: Definition, tokens: int, uuid: str = "w", offset: int = 4) -> Workload:
    """Drawn inputs; the first expert that is here is `offset`, and the weights add up to 2.5."""
    scalars = {"local_expert_offset": InputSpec("scalar", offset), "routed_scaling_factor": InputSpec("scalar", 2.5)}
    inputs = {name: scalars.get(name, InputSpec("random")) for name in of.inputs}
    return Workload(uuid, {"seq_len": tokens}, inputs)


def dataset(of: Definition, *workloads: Workload) -> DataSet:
    """One definition and its workloads."""
    return DataSet(ROOT, {of.name: of}, {of.name: workloads})

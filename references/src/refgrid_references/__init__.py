"""Pure-PyTorch references of LLM kernels: what a kernel computes, written as its equation.

Every op is a function of the tensors of its definition, in the definition's order. It computes in float32, casts the
result last, and leaves its inputs as they are. Imports torch and math only.
"""

from refgrid_references.dsa import dsa_sparse_attention, dsa_topk_indexer_fp8
from refgrid_references.gdn import gdn_decode, gdn_mtp, gdn_prefill
from refgrid_references.gemm import gemm
from refgrid_references.gqa import gqa_paged_decode, gqa_paged_prefill_causal, gqa_ragged_prefill_causal
from refgrid_references.grouped import gqa_grouped
from refgrid_references.mamba import mamba_ssu_decode
from refgrid_references.mla import mla_paged_decode, mla_paged_prefill_causal, mla_ragged_prefill_causal
from refgrid_references.moe import (
    moe_fp8_block_scale_ds_routing,
    moe_fp8_block_scale_renorm,
    trtllm_fp4_block_scale_moe,
    trtllm_fp4_block_scale_moe_topk1,
    trtllm_fp4_block_scale_routed_moe,
    trtllm_fp8_per_tensor_scale_moe,
    trtllm_fp8_per_tensor_scale_moe_topk1,
)
from refgrid_references.norm import fused_add_rmsnorm, rmsnorm
from refgrid_references.rope import rope_with_cos_sin_cache_neox_style
from refgrid_references.sampling import (
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_probs,
    top_p_sampling_from_probs,
)

__all__ = [
    "dsa_sparse_attention",
    "dsa_topk_indexer_fp8",
    "fused_add_rmsnorm",
    "gdn_decode",
    "gdn_mtp",
    "gdn_prefill",
    "gemm",
    "gqa_grouped",
    "gqa_paged_decode",
    "gqa_paged_prefill_causal",
    "gqa_ragged_prefill_causal",
    "mamba_ssu_decode",
    "mla_paged_decode",
    "mla_paged_prefill_causal",
    "mla_ragged_prefill_causal",
    "moe_fp8_block_scale_ds_routing",
    "moe_fp8_block_scale_renorm",
    "rmsnorm",
    "rope_with_cos_sin_cache_neox_style",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_probs",
    "top_p_sampling_from_probs",
    "trtllm_fp4_block_scale_moe",
    "trtllm_fp4_block_scale_moe_topk1",
    "trtllm_fp4_block_scale_routed_moe",
    "trtllm_fp8_per_tensor_scale_moe",
    "trtllm_fp8_per_tensor_scale_moe_topk1",
]

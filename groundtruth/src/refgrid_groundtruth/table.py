"""The table of sources: which library serves which op, with which of its functions, where."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Families of ops: the modules of each library's folder, and of `answers`.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "norm": ("rmsnorm", "fused_add_rmsnorm"),
    "gemm": ("gemm",),
    "gqa": ("gqa_paged_decode", "gqa_paged_prefill_causal", "gqa_ragged_prefill_causal"),
    "grouped": ("gqa_grouped",),
    "mla": ("mla_paged_decode", "mla_paged_prefill_causal", "mla_ragged_prefill_causal"),
    "moe": (
        "moe_fp8_block_scale_ds_routing",
        "moe_fp8_block_scale_renorm",
        "trtllm_fp8_per_tensor_scale_moe",
        "trtllm_fp8_per_tensor_scale_moe_topk1",
        "trtllm_fp4_block_scale_moe",
        "trtllm_fp4_block_scale_moe_topk1",
        "trtllm_fp4_block_scale_routed_moe",
    ),
    "dsa": ("dsa_sparse_attention", "dsa_topk_indexer_fp8"),
    "mamba": ("mamba_ssu_decode",),
    "rope": ("rope_with_cos_sin_cache_neox_style",),
    "gdn": ("gdn_decode", "gdn_mtp", "gdn_prefill"),
    "sampling": (
        "top_k_sampling_from_probs",
        "top_p_sampling_from_probs",
        "top_k_top_p_sampling_from_probs",
    ),
}
FAMILY: Mapping[str, str] = {op: family for family, ops in FAMILIES.items() for op in ops}


@dataclass(frozen=True)
class Source:
    """One trusted origin of results: a library, or one backend of it.

    `versions` is a PEP 440 specifier of the releases it serves; `needs` gives for each op the library's functions that
    its adapter calls, `options` what is bound of the adapter's parameters; `capability` is the one compute capability
    that the source's kernels exist for, and `compiles` says that they are built at the first call. `adapters` is the
    folder of its adapters where that is not called like the library. `runs` says what computes an op, by globs of ops
    of which the first that fits counts: sources that run the same are one truth. It is declared here, and held against
    what a profiler saw in results/independence. `judges` are the ops for which it is asked, beside those that it
    serves, when others disagree.
    """

    name: str
    library: str
    distribution: str
    versions: str
    needs: Mapping[str, tuple[str, ...]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    capability: tuple[int, int] | None = None
    compiles: bool = False
    adapters: str = ""
    runs: Mapping[str, str] = field(default_factory=dict)
    judges: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        """Where the adapters are: refgrid_groundtruth.<folder>.<family of the op>.<op>."""
        return self.adapters or self.library

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that this source serves."""
        return tuple(self.needs)

    def kernel(self, op: str) -> str:
        """What computes an op here."""
        return next((runs for glob, runs in self.runs.items() if fnmatchcase(op, glob)), self.name)

    def row(self, op: str) -> str:
        """What the table says of one op, as text: when it is the same, so is what is called and how."""
        told = (self.distribution, self.versions, self.devices, self.capability, self.compiles)
        needs, options = self.needs.get(op, ()), dict(self.options.get(op, {}))
        return repr((self.name, self.library, self.folder, *told, needs, options, self.kernel(op)))


@dataclass(frozen=True)
class Origin:
    """What makes an adapter what it is: modules with all that they import of their package but `apart`, and its row."""

    modules: tuple[str, ...]
    apart: tuple[str, ...]
    row: str


_FLASH = (
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._flash_attention_forward",
)
_MATH = ("torch.nn.functional.scaled_dot_product_attention",)
_OLMO2_NORM = ("transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm",)
_EAGER = ("transformers.models.llama.modeling_llama.eager_attention_forward",)
_FLASHINFER_NORM = "FlashInfer's norm.cuh"
_DECODE = ("flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper",)
_PREFILL = ("flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper",)
_RAGGED = ("flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper",)
_MLA = ("flashinfer.mla.BatchMLAPagedAttentionWrapper",)
_DEEPSEEK_MOE = ("transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE",)
_QWEN3_EXPERTS = ("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",)
_QWEN3_MOE = (*_QWEN3_EXPERTS, "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter")
_LLAMA4_MOE = (
    "transformers.models.llama4.modeling_llama4.Llama4TextMoe",
    "transformers.models.llama4.modeling_llama4.Llama4Router",
)
_CUTLASS_MOE = ("flashinfer.fused_moe.cutlass_fused_moe",)
_CUTLASS_RENORM = (*_CUTLASS_MOE, "flashinfer.top_k", "flashinfer.sampling.softmax")
_TRTLLM_MOE = ("flashinfer.fused_moe.trtllm_fp8_block_scale_moe",)
_SGLANG_MOE = (  # of every op, since the adapters' module imports them all
    "sglang.jit_kernel.moe_fused_gate.moe_fused_gate",
    "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe.fused_moe",
)
_QWEN3_NEXT = "transformers.models.qwen3_next.modeling_qwen3_next"
_SGLANG_DELTA = (
    "sglang.srt.layers.attention.fla.fused_sigmoid_gating_recurrent.fused_sigmoid_gating_delta_rule_update",
)
_TOP_K_WARPER = "transformers.generation.logits_process.TopKLogitsWarper"
_TOP_P_WARPER = "transformers.generation.logits_process.TopPLogitsWarper"
_SGLANG_SAMPLER = ("sglang.srt.layers.sampler.top_k_top_p_min_p_sampling_from_probs_torch",)
_SGLANG_TRITON = (  # both for every op, since the adapters' module imports them
    "sglang.srt.layers.attention.triton_ops.decode_attention.decode_attention_fwd",
    "sglang.srt.layers.attention.triton_ops.extend_attention.extend_attention_fwd",
)
_MINIMAX_ROPE = ("transformers.models.minimax_m2.modeling_minimax_m2.apply_rotary_pos_emb",)
_FLASHMLA = ("sgl_kernel.flash_mla.flash_mla_with_kvcache", "sgl_kernel.flash_mla.get_mla_metadata")
_SPARSE_FLASHMLA = ("sgl_kernel.flash_mla.flash_mla_sparse_fwd",)
_INDEX_LOGITS = (
    *_SPARSE_FLASHMLA,  # as the adapters' module imports it
    "deep_gemm.get_num_sms",
    "deep_gemm.get_paged_mqa_logits_metadata",
    "deep_gemm.fp8_paged_mqa_logits",
)


def _flashinfer(name: str, needs: Mapping[str, tuple[str, ...]], **more: Any) -> Source:
    """A source of FlashInfer; the range is 0.5.3 to 0.7.2.post1 as read, and what lies between."""
    common: dict[str, Any] = {"devices": ("cuda",), "compiles": True}
    return Source(name, "flashinfer", "flashinfer-python", ">=0.5,<0.8", needs, **common, **more)


SOURCES: tuple[Source, ...] = (
    Source(
        "torch",
        "torch",
        "torch",
        ">=2.5",
        {
            "rmsnorm": ("torch.nn.functional.rms_norm",),
            "fused_add_rmsnorm": ("torch.nn.functional.rms_norm",),
            "gemm": ("torch.nn.functional.linear",),
            "gqa_paged_decode": _FLASH,
            "gqa_paged_prefill_causal": _FLASH,
            "gqa_ragged_prefill_causal": _FLASH,
            "gqa_grouped": _FLASH,
            "mla_paged_decode": _MATH,
            "mla_paged_prefill_causal": _MATH,
            "mla_ragged_prefill_causal": _MATH,
        },
        runs={"gqa_*": "PyTorch's flash attention", "*": "PyTorch's operators"},
    ),
    Source(
        "transformers",
        "transformers",
        "transformers",
        ">=5,<6",
        {
            "rmsnorm": _OLMO2_NORM,
            "fused_add_rmsnorm": _OLMO2_NORM,
            "gqa_paged_decode": _EAGER,
            "gqa_paged_prefill_causal": _EAGER,
            "gqa_ragged_prefill_causal": _EAGER,
            "gqa_grouped": _EAGER,
            "mla_paged_decode": _EAGER,
            "mla_paged_prefill_causal": _EAGER,
            "mla_ragged_prefill_causal": _EAGER,
            "mamba_ssu_decode": ("transformers.models.mamba2.modeling_mamba2.mamba2_selective_state_update",),
            "rope_with_cos_sin_cache_neox_style": _MINIMAX_ROPE,
            "gdn_decode": (f"{_QWEN3_NEXT}.torch_recurrent_gated_delta_rule",),
            "gdn_mtp": (f"{_QWEN3_NEXT}.torch_recurrent_gated_delta_rule",),
            "gdn_prefill": (f"{_QWEN3_NEXT}.torch_chunk_gated_delta_rule",),
            "moe_fp8_block_scale_ds_routing": _DEEPSEEK_MOE,
            "moe_fp8_block_scale_renorm": _QWEN3_MOE,
            "trtllm_fp8_per_tensor_scale_moe": _QWEN3_MOE,
            "trtllm_fp8_per_tensor_scale_moe_topk1": _LLAMA4_MOE,
            "trtllm_fp4_block_scale_moe": _QWEN3_MOE,
            "trtllm_fp4_block_scale_moe_topk1": _LLAMA4_MOE,
            "trtllm_fp4_block_scale_routed_moe": _QWEN3_EXPERTS,
            "top_k_sampling_from_probs": (_TOP_K_WARPER,),
            "top_p_sampling_from_probs": (_TOP_P_WARPER,),
            "top_k_top_p_sampling_from_probs": (_TOP_K_WARPER, _TOP_P_WARPER),
        },
        runs={"*": "transformers' formulas over PyTorch's operators"},
    ),
    _flashinfer(
        "flashinfer",
        {
            "rmsnorm": ("flashinfer.norm.rmsnorm",),
            "fused_add_rmsnorm": ("flashinfer.norm.fused_add_rmsnorm",),
            "gqa_paged_decode": _DECODE,
            "mamba_ssu_decode": ("flashinfer.mamba.selective_state_update",),
            "rope_with_cos_sin_cache_neox_style": ("flashinfer.rope.apply_rope_with_cos_sin_cache",),
            "gdn_decode": ("flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose",),
            "gdn_mtp": ("flashinfer.gdn_decode.gated_delta_rule_mtp",),
            "gdn_prefill": ("flashinfer.gdn_prefill.chunk_gated_delta_rule",),
            "moe_fp8_block_scale_ds_routing": (*_CUTLASS_MOE, "flashinfer.fused_moe.fused_topk_deepseek"),
            "moe_fp8_block_scale_renorm": _CUTLASS_RENORM,
            "trtllm_fp8_per_tensor_scale_moe": _CUTLASS_RENORM,
            "trtllm_fp4_block_scale_moe": _CUTLASS_RENORM,
            "trtllm_fp4_block_scale_routed_moe": _CUTLASS_MOE,
            **{op: (f"flashinfer.sampling.{op}",) for op in FAMILIES["sampling"]},
        },
        options={"gqa_paged_decode": {"use_tensor_cores": False}},
        runs={"*rmsnorm": _FLASHINFER_NORM, "gqa_*": "FlashInfer's decode on CUDA cores", "*": "FlashInfer"},
    ),
    _flashinfer(
        "flashinfer-fa2",
        {
            "gqa_paged_decode": _DECODE,
            "gqa_paged_prefill_causal": _PREFILL,
            "gqa_ragged_prefill_causal": _RAGGED,
            "mla_paged_decode": _MLA,
            "mla_paged_prefill_causal": _MLA,
            "mla_ragged_prefill_causal": _RAGGED,
        },
        options={
            "gqa_paged_decode": {"use_tensor_cores": True},
            "gqa_paged_prefill_causal": {"backend": "fa2"},
            "gqa_ragged_prefill_causal": {"backend": "fa2"},
            "mla_paged_decode": {"backend": "fa2"},
            "mla_paged_prefill_causal": {"backend": "fa2"},
            "mla_ragged_prefill_causal": {"backend": "fa2"},
        },
        runs={"*": "FlashInfer's fa2"},
    ),
    _flashinfer(
        "flashinfer-fa3",
        {
            "gqa_paged_prefill_causal": _PREFILL,
            "gqa_ragged_prefill_causal": _RAGGED,
            "mla_paged_decode": _MLA,
            "mla_paged_prefill_causal": _MLA,
            "mla_ragged_prefill_causal": _RAGGED,
        },
        options={
            "gqa_paged_prefill_causal": {"backend": "fa3"},
            "gqa_ragged_prefill_causal": {"backend": "fa3"},
            "mla_paged_decode": {"backend": "fa3"},
            "mla_paged_prefill_causal": {"backend": "fa3"},
            "mla_ragged_prefill_causal": {"backend": "fa3"},
        },
        runs={"*": "FlashInfer's fa3"},
        capability=(9, 0),
    ),
    _flashinfer(
        "flashinfer-trtllm",
        {"moe_fp8_block_scale_ds_routing": _TRTLLM_MOE, "moe_fp8_block_scale_renorm": _TRTLLM_MOE},
        options={
            "moe_fp8_block_scale_ds_routing": {"trtllm": True},
            "moe_fp8_block_scale_renorm": {"trtllm": True},
        },
        runs={"*": "TensorRT-LLM's kernels"},
        capability=(10, 0),
    ),
    Source(
        "sglang",
        "sglang",
        "sglang",
        ">=0.5,<0.6",
        {
            "rmsnorm": ("sgl_kernel", "torch.ops.sgl_kernel.rmsnorm"),
            "fused_add_rmsnorm": ("sgl_kernel", "torch.ops.sgl_kernel.fused_add_rmsnorm"),
            "gqa_paged_decode": _SGLANG_TRITON,
            "gqa_paged_prefill_causal": _SGLANG_TRITON,
            "gqa_ragged_prefill_causal": _SGLANG_TRITON,
            "mla_paged_decode": _FLASHMLA,
            "dsa_sparse_attention": _SPARSE_FLASHMLA,
            "dsa_topk_indexer_fp8": _INDEX_LOGITS,
            "mamba_ssu_decode": ("sglang.srt.layers.attention.mamba.ops.mamba_ssm.selective_state_update",),
            "rope_with_cos_sin_cache_neox_style": ("sglang.jit_kernel.rope.apply_rope_with_cos_sin_cache_inplace",),
            "gdn_decode": _SGLANG_DELTA,
            "gdn_mtp": _SGLANG_DELTA,
            "gdn_prefill": ("sglang.srt.layers.attention.fla.chunk.chunk_gated_delta_rule",),
            "moe_fp8_block_scale_ds_routing": _SGLANG_MOE,
            "moe_fp8_block_scale_renorm": _SGLANG_MOE,
            "trtllm_fp8_per_tensor_scale_moe": _SGLANG_MOE,
            "trtllm_fp8_per_tensor_scale_moe_topk1": _SGLANG_MOE,
            "trtllm_fp4_block_scale_moe": _SGLANG_MOE,
            "trtllm_fp4_block_scale_moe_topk1": _SGLANG_MOE,
            "trtllm_fp4_block_scale_routed_moe": _SGLANG_MOE,
            "top_k_sampling_from_probs": _SGLANG_SAMPLER,
            "top_p_sampling_from_probs": _SGLANG_SAMPLER,
        },
        devices=("cuda",),
        runs={
            "*rmsnorm": _FLASHINFER_NORM,  # an older one, which sgl_kernel was built from
            "mla_*": "FlashMLA",
            "dsa_*": "FlashMLA and DeepGEMM",
            "*_sampling_*": "SGLang's formula over PyTorch's operators",
            "*": "SGLang's Triton and CUDA kernels",
        },
    ),
    Source(
        "oracle",
        "torch",
        "torch",
        ">=2.5",
        {
            **dict.fromkeys(FAMILIES["gqa"], ()),
            "gqa_grouped": (),
            "mla_paged_decode": (),
            "mla_paged_prefill_causal": (),
            "mla_ragged_prefill_causal": (),
            **dict.fromkeys(FAMILIES["gdn"], ()),
            **dict.fromkeys((*FAMILIES["dsa"], *FAMILIES["gemm"], *FAMILIES["mamba"], *FAMILIES["rope"]), ()),
            **dict.fromkeys(FAMILIES["moe"], ()),
            **dict.fromkeys(FAMILIES["sampling"], ()),
        },
        adapters="oracle",
        judges=FAMILIES["norm"],
        runs={"*": "float64 formulas of this project"},
    ),
)

# Who settles a disagreement: its numbers are float64 from the first step on.
REFEREE = "oracle"

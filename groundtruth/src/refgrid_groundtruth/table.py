"""The table of sources: which library serves which op, with which of its functions, where."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Families of ops: the modules of each library's folder, and of `answers`.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "norm": ("rmsnorm", "fused_add_rmsnorm"),
    "gemm": ("gemm",),
    "gqa": ("gqa_paged_decode", "gqa_paged_prefill_causal"),
}
FAMILY: Mapping[str, str] = {op: family for family, ops in FAMILIES.items() for op in ops}


@dataclass(frozen=True)
class Source:
    """One trusted origin of results: a library, or one backend of it.

    `versions` is a PEP 440 specifier of the releases it serves; `needs` gives for each op the library's functions that
    its adapter calls, `options` what is bound of the adapter's parameters; `capability` is the one compute capability
    that the source's kernels exist for, and `compiles` says that they are built at the first call. `adapters` is the
    folder of its adapters where that is not called like the library.
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

    @property
    def folder(self) -> str:
        """Where the adapters are: refgrid_groundtruth.<folder>.<family of the op>.<op>."""
        return self.adapters or self.library

    @property
    def ops(self) -> tuple[str, ...]:
        """The ops that this source serves."""
        return tuple(self.needs)


_FLASH = (
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "torch.ops.aten._flash_attention_forward",
)
_OLMO2_NORM = ("transformers.models.olmo2.modeling_olmo2.Olmo2RMSNorm",)
_EAGER = ("transformers.models.llama.modeling_llama.eager_attention_forward",)
_DECODE = ("flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper",)
_PREFILL = ("flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper",)


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
        },
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
        },
    ),
    _flashinfer(
        "flashinfer",
        {
            "rmsnorm": ("flashinfer.norm.rmsnorm",),
            "fused_add_rmsnorm": ("flashinfer.norm.fused_add_rmsnorm",),
            "gqa_paged_decode": _DECODE,
        },
        options={"gqa_paged_decode": {"use_tensor_cores": False}},
    ),
    _flashinfer(
        "flashinfer-fa2",
        {"gqa_paged_decode": _DECODE, "gqa_paged_prefill_causal": _PREFILL},
        options={
            "gqa_paged_decode": {"use_tensor_cores": True},
            "gqa_paged_prefill_causal": {"backend": "fa2"},
        },
    ),
    _flashinfer(
        "flashinfer-fa3",
        {"gqa_paged_prefill_causal": _PREFILL},
        options={"gqa_paged_prefill_causal": {"backend": "fa3"}},
        capability=(9, 0),
    ),
    Source(
        "sglang",
        "sglang",
        "sglang",
        ">=0.5,<0.6",
        {},
        devices=("cuda",),
    ),
    Source(
        "oracle",
        "torch",
        "torch",
        ">=2.5",
        {},
        adapters="oracle",
    ),
)

"""Pure-PyTorch references of LLM kernels: what a kernel computes, written as its equation.

Every op is a function of the tensors of its definition, in the definition's order. It computes in float32, casts the
result last, and leaves its inputs as they are. Imports torch and math only.
"""

from refgrid_references.gemm import gemm
from refgrid_references.gqa import gqa_paged_decode, gqa_paged_prefill_causal
from refgrid_references.norm import fused_add_rmsnorm, rmsnorm

__all__ = ["fused_add_rmsnorm", "gemm", "gqa_paged_decode", "gqa_paged_prefill_causal", "rmsnorm"]

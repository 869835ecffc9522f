"""FlashAttention-3 of the fa3-fwd wheel: one forward launch a mask, over keys that the slices share.

The wheel holds no backward kernels: the gradients are PyTorch's FlashAttention-2, as in the backend "torch".
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from refgrid_solutions.grouped_attention.backends import aten
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan
from refgrid_solutions.grouped_attention.predicted import faster_way, splits
from refgrid_solutions.grouped_attention.sequences import Launch, assembled, minus_infinity, packed, unpacked

_HOPPER = (9, 0)
_KERNELS = "fa3_fwd._C"


def refuses(plan: GroupedAttnPlan) -> str:
    """Another GPU than the one that the wheel was built for, or what the backward pass refuses."""
    capability = torch.cuda.get_device_capability(plan.device)
    if capability != _HOPPER:
        return f"compute capability = {capability}, but should be (9, 0)"
    return aten.refuses(plan)


def metadata(plan: GroupedAttnPlan, both: bool) -> Sequence[torch.Tensor]:
    """The launches, into how many parts keys are split, and the way to go backward."""
    importlib.import_module(_KERNELS)  # registers torch.ops.fa3_fwd
    return packed(plan, faster_way(plan) if both else None, splits(plan, _processors(plan.device)))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch a mask. q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim] -> out, lse."""
    (parts, *_), launches = unpacked(plan.metadata("fa3"))
    q, k, v = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (q, k, v))
    return assembled(q, launches, [_attend(q[launch.rows], k, v, launch, scale, parts) for launch in launches])


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: GroupedAttnPlan,
    scale: float,
) -> aten.Gradients:
    """Gradients of q, k and v, each as its tensor: PyTorch's kernel."""
    (_, way), launches = unpacked(plan.metadata("fa3"))
    return aten.gradients((dout, q, k, v, out, lse), plan, launches, way, scale)


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Launch, scale: float, parts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.fa3_fwd.fwd(
        *(q, k, v),
        cu_seqlens_q=launch.row_offsets,
        cu_seqlens_k=launch.key_starts,
        seqused_k=launch.key_counts,
        max_seqlen_q=launch.longest_rows,
        max_seqlen_k=launch.longest_keys,
        softmax_scale=scale,
        is_causal=launch.causal,
        num_splits=parts,
    )
    return out, minus_infinity(lse, launch)

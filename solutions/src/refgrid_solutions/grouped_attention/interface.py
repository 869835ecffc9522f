"""What callers use: attention by a plan."""

from __future__ import annotations

from typing import Literal, overload

import torch

from refgrid_solutions.grouped_attention.arguments import scale_of
from refgrid_solutions.grouped_attention.ops import grouped_attn_forward
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan

Pair = tuple[torch.Tensor, torch.Tensor]


@overload
def grouped_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: GroupedAttnPlan,
    *,
    softmax_scale: float | None = ...,
    return_lse: Literal[True] = ...,
    backend: str = ...,
) -> Pair: ...


@overload
def grouped_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: GroupedAttnPlan,
    *,
    softmax_scale: float | None = ...,
    return_lse: Literal[False],
    backend: str = ...,
) -> torch.Tensor: ...


def grouped_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: GroupedAttnPlan,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = True,
    backend: str = "auto",
) -> Pair | torch.Tensor:
    """Exact attention of every slice of the plan, in one call; differentiable in q, k and v.

    q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim], of the plan's dtype and on its device
    -> out as q; lse [num_heads_q, total_q] float32 (float64 for float64), natural logarithm, without a gradient.
    A row in no slice, or that sees no key, gives 0 and -inf. Gradients of k and v are summed over slices in float32 and
    rounded once. softmax_scale: head_dim ** -0.5 by default. The values of keys in no range never matter, but must be
    finite. ValueError if a tensor does not fit the plan, the scale is not finite, or the backend cannot run it.

    backend: "auto" is plan.auto_backends, the first where no gradient is needed and the second where grad mode is on
    and q, k or v requires one. Name a backend where both must give the same bits, as a reentrant checkpoint, which runs
    once without gradients and once with them, may want.
    """
    _check(q, k, v, plan)
    scale = scale_of(softmax_scale, plan.head_dim)
    name = plan.prepare(backend, backward=needs_gradients(q, k, v))
    out, lse = grouped_attn_forward(q, k, v, plan.host, list(plan.metadata(name)), scale, name)
    return (out, lse) if return_lse else out


def needs_gradients(*tensors: torch.Tensor) -> bool:
    """Whether what is computed from them now may be differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan) -> None:
    rows, keys = (plan.total_q, plan.num_heads_q, plan.head_dim), (plan.total_k, plan.num_heads_k, plan.head_dim)
    for name, tensor, shape in (("q", q, rows), ("k", k, keys), ("v", v, keys)):
        for what, value, planned in (
            ("shape", tuple(tensor.shape), shape),
            ("dtype", tensor.dtype, plan.dtype),
            ("device", tensor.device, plan.device),
        ):
            if value != planned:
                raise ValueError(f"{name}.{what} = {value}, but should be {planned}, as planned")

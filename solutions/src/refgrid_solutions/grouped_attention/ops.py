"""The custom ops refgrid::grouped_attn_forward and _backward: what torch.compile sees of a grouped attention.

They take tensors, a number and the name of a backend. The plan crosses as its host tensor and its backend's metadata,
and is made again inside; nothing is kept between calls.
"""

from __future__ import annotations

from typing import Any

import torch

from refgrid_solutions.grouped_attention import backends
from refgrid_solutions.grouped_attention.plan import rebuilt

Tensors = list[torch.Tensor]


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, host: torch.Tensor, metadata: Tensors, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [total_q, num_heads_q, head_dim] as q, and lse [num_heads_q, total_q], natural logarithm."""
    plan = rebuilt(q, k, host, backend, metadata)
    return backends.load(backend).forward(q, k, v, plan, scale)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    host: torch.Tensor,
    metadata: Tensors,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, each as its tensor."""
    plan = rebuilt(q, k, host, backend, metadata)
    return backends.load(backend).backward(dout, q, k, v, out, lse, plan, scale)


def _forward_shapes(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, host: torch.Tensor, metadata: Tensors, scale: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    del k, v, host, metadata, scale, backend
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=wide)


def _backward_shapes(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del dout, others
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, host, metadata, scale, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, host, *metadata)
    ctx.scale, ctx.backend = scale, backend
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: torch.Tensor | None, dlse: None) -> tuple[Any, ...]:
    """For the seven inputs of the forward op, the metadata a list; lse is not differentiable and has no gradient."""
    del dlse
    q, k, v, out, lse, host, *metadata = ctx.saved_tensors
    of_plan = (None, [None] * len(metadata), None, None)
    if dout is None:
        return (None, None, None, *of_plan)
    return (*grouped_attn_backward(dout, q, k, v, out, lse, host, metadata, ctx.scale, ctx.backend), *of_plan)


grouped_attn_forward = torch.library.custom_op("refgrid::grouped_attn_forward", _forward, mutates_args=())
grouped_attn_forward.register_fake(_forward_shapes)
grouped_attn_forward.register_autograd(_gradients, setup_context=_keep)
grouped_attn_backward = torch.library.custom_op("refgrid::grouped_attn_backward", _backward, mutates_args=())
grouped_attn_backward.register_fake(_backward_shapes)

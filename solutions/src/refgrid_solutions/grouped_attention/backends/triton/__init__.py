"""Kernels of our own in Triton, forward and backward, for Hopper GPUs; elsewhere by Triton's interpreter.

All gradients are sums in one order, whatever the plan says of deterministic; keys are never split (max_splits).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.runtime.jit import JITFunction

from refgrid_solutions.grouped_attention.backends.triton import worklist
from refgrid_solutions.grouped_attention.backends.triton.backward import differentiated
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Configuration, Tiles
from refgrid_solutions.grouped_attention.backends.triton.forward import attend, attended
from refgrid_solutions.grouped_attention.backends.triton.items import loadable
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan

_SINCE = (3, 6)
_HOPPER = (9, 0)


def refuses(plan: GroupedAttnPlan) -> str:
    """An older Triton, another GPU, and on a CPU whatever Triton's interpreter is not there for."""
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _SINCE:
        return f"triton = {triton.__version__}, but should be 3.6 or later"
    compiled = isinstance(attend, JITFunction)
    if plan.device.type == "cuda":
        capability = torch.cuda.get_device_capability(plan.device)
        if not compiled:
            return "TRITON_INTERPRET was set when the kernels were imported: they run on a CPU"
        return "" if capability == _HOPPER else f"compute capability = {capability}, but should be (9, 0)"
    if compiled:
        return "on a CPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1 before they are imported"
    return "" if plan.dtype == torch.float16 else "Triton's interpreter multiplies float16 only, of the two dtypes"


def metadata(plan: GroupedAttnPlan) -> Sequence[torch.Tensor]:
    """The sizes of the tiles, on the CPU, and what there is to do with each."""
    sizes = TABLE[plan.head_dim]
    of = worklist.pieces(plan.slices, plan.total_q)
    rows = {tiles[:2]: worklist.row_tiles(of, *tiles[:2]) for tiles in (sizes.forward, sizes.of_rows)}
    keys = worklist.key_tiles(of, plan.total_k, *sizes.of_keys[:2])
    there = worklist.copied(plan.device, *rows.values(), *keys)
    places = of.last_place[-1:].sum()
    return torch.cat([torch.tensor(sizes).flatten(), places.view(1)]), there[0], there[len(rows) - 1], *there[-2:]


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch. q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim] -> out, lse."""
    sizes, _, work, *_ = _unpacked(plan)
    if not (plan.total_q and plan.total_k):
        return torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    q, scale, _ = _positive(q, scale)
    return attended(loadable(q), loadable(k), loadable(v), scale, work, _section(plan), sizes.forward)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: GroupedAttnPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three launches: what both others need, gradients of q, and those of k and v, each as its tensor."""
    sizes, places, _, *work = _unpacked(plan)
    if not (plan.total_q and plan.total_k):
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    q, scale, sign = _positive(q, scale)
    told = [loadable(tensor) for tensor in (dout, q, k, v)]
    dq, dk, dv = differentiated(told, out, lse, scale, work, _section(plan), sizes, places)
    return dq if sign == 1 else dq * sign, dk, dv


def _unpacked(plan: GroupedAttnPlan) -> tuple[Any, ...]:
    """The tiles, how many places the statistics of rows take, and the lists of work."""
    host, *work = plan.metadata("triton")
    *numbers, places = host.tolist()
    fields = len(Tiles._fields)
    sizes = [Tiles._make(numbers[at : at + fields]) for at in range(0, len(numbers), fields)]
    return Configuration._make(sizes), places, *work


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, int]:
    """Rows and a positive scale of the same scores, and the sign that q took over: the kernels multiply the largest."""
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, -scale or 1.0, sign


def _section(plan: GroupedAttnPlan) -> int:
    return worklist.heads_together(plan.total_k, plan.num_heads_k, plan.head_dim, plan.dtype.itemsize)

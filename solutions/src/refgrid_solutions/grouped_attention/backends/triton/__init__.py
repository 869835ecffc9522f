"""Kernels of our own in Triton, forward and backward, for Hopper GPUs; on a CPU by Triton's interpreter.

Keys are never split (max_splits), and nothing is added up in memory: every call gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

import torch
import triton
from triton.runtime.jit import JITFunction

from refgrid_solutions.grouped_attention.backends.triton import worklist
from refgrid_solutions.grouped_attention.backends.triton.attention import attend, attended
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Configuration, Tiles
from refgrid_solutions.grouped_attention.backends.triton.differentiation import Gradients, Work, differentiated
from refgrid_solutions.grouped_attention.backends.triton.items import loadable
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan, device_ints, host_ints

_SINCE = (3, 6)
_HOPPER = (9, 0)


def refuses(plan: GroupedAttnPlan) -> str:
    """An older Triton, another GPU, and on a CPU whatever Triton's interpreter is not there for."""
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _SINCE:
        return f"triton = {triton.__version__}, but should be 3.6 or later"
    return _unfit_gpu(plan) if plan.device.type == "cuda" else _unfit_interpreter(plan)


def metadata(plan: GroupedAttnPlan, both: bool) -> Sequence[torch.Tensor]:
    """The sizes of the tiles, on the CPU, and what there is to do with each, forward and then backward."""
    sizes = TABLE[plan.head_dim]
    of = worklist.pieces(plan.table.numpy(), plan.total_q)
    tables = [worklist.row_tiles(of, *sizes.forward[:2])]
    if both:
        tables += [worklist.row_tiles(of, *sizes.of_rows[:2]), of.table]
        tables += worklist.key_tiles(of, plan.total_k, sizes.of_keys.keys)
    host = host_ints([*chain(*sizes), of.places])
    return host, *device_ints(plan.device, *(table.data for table in tables))


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch. q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim] -> out, lse."""
    if not (plan.total_q and plan.total_k):
        return q.new_zeros(q.shape), q.new_full((q.shape[1], q.shape[0]), -math.inf, dtype=torch.float32)
    sizes, (work, *_), _ = _unpacked(plan)
    q, scale, _ = _positive(q, scale)
    with torch.cuda.device_of(q):  # Triton launches on the current one
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
) -> Gradients:
    """Three launches: gradients of q, k and v, each as its tensor."""
    if not (plan.total_q and plan.total_k):
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    sizes, work = _going_back(plan)
    q, scale, sign = _positive(q, scale)
    told = [loadable(tensor) for tensor in (dout, q, k, v)]
    with torch.cuda.device_of(q):
        dq, dk, dv = differentiated(told, out.contiguous(), lse.contiguous(), scale, work, sizes)
    return (dq if sign == 1 else dq * sign), dk, dv


def _unfit_gpu(plan: GroupedAttnPlan) -> str:
    if not isinstance(attend, JITFunction):
        return "TRITON_INTERPRET was set when the kernels were imported, so they run on a CPU only"
    capability = torch.cuda.get_device_capability(plan.device)
    return "" if capability == _HOPPER else f"compute capability = {capability}, but should be (9, 0)"


def _unfit_interpreter(plan: GroupedAttnPlan) -> str:
    if isinstance(attend, JITFunction):
        return "on a CPU the kernels need Triton's interpreter: set TRITON_INTERPRET=1 before anything imports triton"
    if plan.dtype != torch.float16:
        return f"Triton's interpreter takes {plan.dtype} for integers when it multiplies"
    return ""


def _unpacked(plan: GroupedAttnPlan) -> tuple[Configuration, list[torch.Tensor], int]:
    """The tiles, the lists of work, and how many places the statistics of all rows take."""
    host, *lists = plan.metadata("triton")
    *numbers, places = host.tolist()
    fields = len(Tiles._fields)
    sizes = [Tiles._make(numbers[at : at + fields]) for at in range(0, len(numbers), fields)]
    return Configuration._make(sizes), lists, places


def _going_back(plan: GroupedAttnPlan) -> tuple[Configuration, Work]:
    sizes, (_, rows, pieces, keys, runs), places = _unpacked(plan)
    return sizes, Work(rows, pieces, keys, runs, places, _section(plan))


def _positive(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float, int]:
    """Rows and a positive scale of the same scores, and the sign that q took over: kernels scale the largest score."""
    if scale > 0:
        return q, scale, 1
    sign = -1 if scale < 0 else 0
    return q * sign, -scale or 1.0, sign


def _section(plan: GroupedAttnPlan) -> int:
    return worklist.heads_together(plan.total_k, plan.num_heads_k, plan.head_dim, plan.dtype.itemsize)

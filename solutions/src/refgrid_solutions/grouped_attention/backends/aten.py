"""FlashAttention-2 as PyTorch brings it: slices as sequences of one launch a mask, forward and backward.

Forward, the keys of a sequence are read where they are (seqused_k). Backward, the kernel needs keys of each sequence's
own: either the keys are copied for each slice and one launch takes all, or each slice is a call of its own. The plan
says which is predicted to be faster; gradients of shared keys are summed in float32 either way.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import torch

from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan
from refgrid_solutions.grouped_attention.predicted import CALLS, faster_way
from refgrid_solutions.grouped_attention.ranges import Slice
from refgrid_solutions.grouped_attention.sequences import (
    Launch,
    assembled,
    joined,
    minus_infinity,
    packed,
    seeing,
    unpacked,
)

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# The shape of the varlen log-sum-exp is [heads, rows] in the releases that this was held against.
_SINCE = (2, 11)
_AMPERE = (8, 0)
_TURNS = threading.Lock()
_SUMMED_IN = torch.float32


def refuses(plan: GroupedAttnPlan) -> str:
    """An older torch or GPU."""
    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < _SINCE:
        return f"torch = {torch.__version__}, but should be 2.11 or later"
    capability = torch.cuda.get_device_capability(plan.device)
    return "" if capability >= _AMPERE else f"compute capability = {capability}, but should be (8, 0) or later"


def metadata(plan: GroupedAttnPlan, both: bool) -> Sequence[torch.Tensor]:
    """The launches, and the way to go backward."""
    return packed(plan, faster_way(plan) if both else None)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch a mask. q [total_q, num_heads_q, head_dim], k and v [total_k, num_heads_k, head_dim] -> out, lse."""
    _, launches = unpacked(plan.metadata("torch"))
    q, k, v = (_dense(tensor) for tensor in (q, k, v))
    return assembled(q, launches, [_attend(q[launch.rows], k, v, launch, scale) for launch in launches])


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
    """Gradients of q, k and v, each as its tensor."""
    (way,), launches = unpacked(plan.metadata("torch"))
    return gradients((dout, q, k, v, out, lse), plan, launches, way, scale)


def gradients(
    tensors: tuple[torch.Tensor, ...], plan: GroupedAttnPlan, launches: Sequence[Launch], way: int, scale: float
) -> Gradients:
    """From dout, q, k, v, out, lse: those of q, k and v, by copies of the keys or by calls. fa3 needs it too."""
    dout, q, k, v, out, lse = (_dense(tensor) for tensor in tensors)
    if any(launch.blind for launch in launches):
        lse = lse.masked_fill(lse == -math.inf, math.inf)  # what the kernel itself writes for a row without keys
    sums = [torch.zeros(keys.shape, dtype=_SUMMED_IN, device=keys.device) for keys in (k, v)]
    step = _by_calls if way == CALLS else _by_copies
    with _deterministic(plan.deterministic):
        dq = [step((dout, q, k, v, out, lse), sums, plan, launch, scale) for launch in launches]
    return joined(q, launches, dq), sums[0].to(k.dtype), sums[1].to(v.dtype)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: Launch, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - the one name that takes seqused_k
        *(q, k, v, launch.row_offsets, launch.key_starts),
        *(_two_or_more(launch.longest_rows), launch.longest_keys),
        *(0.0, launch.causal, False),
        scale=scale,
        seqused_k=launch.key_counts,
    )
    return out, minus_infinity(lse, launch)


def _by_copies(
    tensors: tuple[torch.Tensor, ...], sums: list[torch.Tensor], plan: GroupedAttnPlan, launch: Launch, scale: float
) -> torch.Tensor:
    """One launch for all slices of the mask, each with a copy of its keys; gives dq of the launch's rows."""
    dout, q, k, v, out, lse = tensors
    own = seeing(plan, launch.mask_type)
    (copied_offsets,) = launch.backward
    rows, offsets = launch.rows, (launch.row_offsets, copied_offsets)
    longest = (launch.longest_rows, launch.longest_keys)
    of_rows = (dout[rows], q[rows], out[rows], lse[:, rows].contiguous())
    dq, dk, dv = _differentiate(of_rows, _copied(k, own), _copied(v, own), offsets, longest, launch.causal, scale)
    for total, parts in zip(sums, (dk, dv), strict=True):
        for piece, part in zip(own, parts.split([piece.num_keys for piece in own]), strict=True):
            total[piece.k_start : piece.k_end] += part
    return dq


def _by_calls(
    tensors: tuple[torch.Tensor, ...], sums: list[torch.Tensor], plan: GroupedAttnPlan, launch: Launch, scale: float
) -> torch.Tensor:
    """A launch for each slice, on the keys where they are; gives dq of the launch's rows."""
    dout, q, k, v, out, lse = tensors
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    own_rows, own_keys = (offsets.view(-1, 2) for offsets in launch.backward)
    for index, piece in enumerate(seeing(plan, launch.mask_type)):
        rows, keys = slice(piece.q_start, piece.q_end), slice(piece.k_start, piece.k_end)
        of_rows = (dout[rows], q[rows], out[rows], lse[:, rows].contiguous())
        offsets, longest = (own_rows[index], own_keys[index]), (piece.num_rows, piece.num_keys)
        dq[rows], dk, dv = _differentiate(of_rows, k[keys], v[keys], offsets, longest, launch.causal, scale)
        sums[0][keys] += dk
        sums[1][keys] += dv
    return dq[launch.rows]


def _differentiate(
    of_rows: tuple[torch.Tensor, ...],
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: tuple[torch.Tensor, torch.Tensor],
    longest: tuple[int, int],
    causal: bool,
    scale: float,
) -> Gradients:
    dout, q, out, lse = of_rows
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    found: Gradients = torch.ops.aten._flash_attention_backward(  # noqa: SLF001 - the varlen one has no other name
        *(dout, q, k, v, out, lse, *offsets, *longest),
        *(0.0, causal, no_dropout, no_dropout),
        scale=scale,
    )
    return found


def _copied(keys: torch.Tensor, own: Sequence[Slice]) -> torch.Tensor:
    """The keys of each slice back to back; where they already lie so, no copy."""
    if all(one.k_end == other.k_start for one, other in pairwise(own)):
        return keys[own[0].k_start : own[-1].k_end]
    return torch.cat([keys[piece.k_start : piece.k_end] for piece in own])


def _two_or_more(longest_rows: int) -> int:
    """Told that no sequence has two rows, the kernel takes heads for rows and gives lse in another layout."""
    return max(longest_rows, 2)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """PyTorch tells its kernel by a global setting whether dq must be the same bits every time.

    Threads take turns: the end of one call must not take the setting from another.
    """
    with _TURNS if wanted else nullcontext():
        was = torch.are_deterministic_algorithms_enabled()
        only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        if not wanted or (was and not only_warned):
            yield
            return
        memory = torch.utils.deterministic
        filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False  # all of it is written
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=only_warned)
            memory.fill_uninitialized_memory = filled

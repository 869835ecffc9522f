"""Attention over gathered keys, a few heads at a time: while one step computes, the keys of the next are on their way.

Backward gathers the keys again rather than keep them: for W ranks they are W times what a rank holds. Gradients of keys
are summed over ranks in float32 (float64 for float64) and rounded once, at the end. Each rank's own part is what its
backend gives, summed over slices in float32 and rounded to the dtype of k. To add those parts in bfloat16, as a
reduction in that dtype does, would round world_size - 1 times, each time to 8 bits of a sum that grows. The price is
twice the bytes of a bfloat16 reduction, sent while the next step computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from refgrid_solutions.grouped_attention.backends import Backend, load
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan
from refgrid_solutions.grouped_attention.zigzag.exchange import Exchange, Pending
from refgrid_solutions.grouped_attention.zigzag.planned import ZigzagPlan

Pair = tuple[torch.Tensor, torch.Tensor]
Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Run(NamedTuple):
    """All that a call does besides its tensors. backends: one for each call of the plan; stride: heads of k a step."""

    exchange: Exchange
    plan: ZigzagPlan
    backends: tuple[str, ...]
    stride: int
    scale: float

    @property
    def calls(self) -> Iterator[tuple[slice | torch.Tensor, Backend, GroupedAttnPlan]]:
        """Of each call of a step the rows, the backend's functions and the plan that they are told.

        Not by the custom ops: none of this is compiled, and what is around an op takes the host 15 us a call.
        """
        for (rows, plan), name in zip(self.plan.calls, self.backends, strict=True):
            yield rows, load(name), plan


class Step(NamedTuple):
    """Some heads of q, those of k that they attend to, and the keys and values of these that this rank sees."""

    q_heads: slice
    k_heads: slice
    k: torch.Tensor
    v: torch.Tensor


class ZigzagAttention(torch.autograd.Function):
    """One rank's rows over the keys of all; q, k, v in local order -> out as q, lse [num_heads_q, rows]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run) -> Pair:
        """The log-sum-exp is not differentiable."""
        out, lse = forward(q, k, v, run)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.run = run
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch gives it no types
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor) -> tuple[Any, ...]:
        """All three always, whichever are asked for here: other ranks wait for this one's part."""
        del dlse
        return *backward((dout, *ctx.saved_tensors), ctx.run), None


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run) -> Pair:
    """out and lse of this rank's rows."""
    out, lse = _Whole(q.shape), _Whole((q.shape[1], q.shape[0]))
    for step in _steps(q, k, v, run):
        for rows, backend, plan in run.calls:
            found = backend.forward(q[rows, step.q_heads], step.k, step.v, plan, run.scale)
            out.put((rows, step.q_heads), found[0])
            lse.put((step.q_heads, rows), found[1])
    return out.tensor, lse.tensor


def backward(tensors: tuple[torch.Tensor, ...], run: Run) -> Gradients:
    """From dout, q, k, v, out and lse of this rank: its dq, and dk and dv of its keys from the rows of all ranks."""
    dout, q, k, v, out, lse = tensors
    dq = _Whole(q.shape)
    sums = _Sums(k, v, run)
    for step in _steps(q, k, v, run):
        parts = []
        for rows, backend, plan in run.calls:
            at = rows, step.q_heads
            of_rows = out[at], lse[step.q_heads, rows].contiguous()
            found, *of_keys = backend.backward(dout[at], q[at], step.k, step.v, *of_rows, plan, run.scale)
            dq.put(at, found)
            parts.append(of_keys)
        sums.add(step.k_heads, parts)
    return dq.tensor, *sums.finished()


class _Whole:
    """A tensor of some shape that comes in parts; a part that has this shape is the tensor, without a copy."""

    tensor: torch.Tensor

    def __init__(self, shape: Sequence[int]) -> None:
        self._shape = tuple(shape)

    def put(self, place: tuple[slice | torch.Tensor, ...], part: torch.Tensor) -> None:
        """There is one part at least."""
        if part.shape == self._shape:
            self.tensor = part
            return
        if not hasattr(self, "tensor"):
            self.tensor = part.new_empty(self._shape)
        self.tensor[place] = part


def _steps(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, run: Run) -> Iterator[Step]:
    """Keys in true order in one buffer, from which a step computes, while those of the next arrive in another."""
    share = q.shape[1] // k.shape[1]
    all_heads = [slice(first, first + run.stride) for first in range(0, k.shape[1], run.stride)]
    arrived = _arrivals(k, v, all_heads, run) if run.plan.seen is not None else _own(k, v, all_heads)
    for heads, (keys, values) in zip(all_heads, arrived, strict=True):
        yield Step(slice(heads.start * share, heads.stop * share), heads, keys, values)


def _own(k: torch.Tensor, v: torch.Tensor, all_heads: list[slice]) -> Iterator[Pair]:
    for heads in all_heads:
        yield k[:, heads], v[:, heads]


def _arrivals(k: torch.Tensor, v: torch.Tensor, all_heads: list[slice], run: Run) -> Iterator[Pair]:
    """Keys and values of some heads after the other; what a step was given holds until it asks for the next."""
    assert run.plan.seen is not None
    shape = (2, run.stride, k.shape[2])
    arriving = k.new_empty(run.exchange.world_size * len(k), *shape)
    ordered = k.new_empty(len(run.plan.seen), *shape)
    # A part must live until it was sent, so its name holds it while the next step is given away.
    part, pending = _sent(k, v, all_heads[0], arriving, run)
    for following in [*all_heads[1:], None]:
        pending.wait()
        torch.index_select(arriving, 0, run.plan.seen, out=ordered)
        if following is not None:
            part, pending = _sent(k, v, following, arriving, run)
        yield ordered[:, 0], ordered[:, 1]
    del part


def _sent(
    k: torch.Tensor, v: torch.Tensor, heads: slice, arriving: torch.Tensor, run: Run
) -> tuple[torch.Tensor, Pending]:
    """Keys and values side by side, so that one collective and one copy move both."""
    part = torch.stack((k[:, heads], v[:, heads]), dim=1)
    return part, run.exchange.gather(arriving, part)


class _Sums:
    """Gradients of keys on their way to the ranks that hold them, while the next step computes."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, run: Run) -> None:
        self._gradients = [torch.empty_like(keys, memory_format=torch.contiguous_format) for keys in (k, v)]
        self._run = run
        self._under_way: tuple[slice, torch.Tensor, torch.Tensor, Pending] | None = None

    def add(self, heads: slice, parts: list[list[torch.Tensor]]) -> None:
        """What the rows of this rank give: dk and dv of each call. Waits for the heads before these."""
        self._arrive()
        if self._run.plan.seen is None:
            self._keep(heads, [_summed(found) for found in zip(*parts, strict=True)])
            return
        whole = self._in_gathered_order([_summed(found) for found in zip(*parts, strict=True)])
        part = torch.empty_like(whole[: len(self._gradients[0])])
        self._under_way = heads, part, whole, self._run.exchange.reduce_scatter(part, whole)

    def finished(self) -> Pair:
        """dk and dv of this rank's keys."""
        self._arrive()
        dk, dv = self._gradients
        return dk, dv

    def _arrive(self) -> None:
        if self._under_way is not None:
            heads, part, _, pending = self._under_way
            pending.wait()
            self._keep(heads, [part[:, 0], part[:, 1]])
            self._under_way = None

    def _keep(self, heads: slice, found: list[torch.Tensor]) -> None:
        for gradient, part in zip(self._gradients, found, strict=True):
            gradient[:, heads] = part

    def _in_gathered_order(self, found: Sequence[torch.Tensor]) -> torch.Tensor:
        """dk and dv of all ranks' keys [keys, 2, heads, head_dim]; of those that this rank does not see, zero."""
        plan = self._run.plan
        assert plan.places is not None
        assert plan.unseen is not None
        shape = (len(plan.places), len(found), *found[0].shape[1:])
        whole = torch.empty(shape, dtype=_wide(found[0].dtype), device=found[0].device)
        for index, part in enumerate(found):
            # Picked in 16 bit, then widened: 1.6 times as fast on an H200 as to scatter float32 into zeros.
            whole[:, index] = part.index_select(0, plan.places)
        return whole.index_fill_(0, plan.unseen, 0)


def _summed(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Of the calls, in float32 (float64 for float64) where there are several."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(_wide(parts[0].dtype))
    for part in parts[1:]:
        total = total + part
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32

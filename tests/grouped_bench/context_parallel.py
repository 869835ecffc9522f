"""What PyTorch's head-tail context parallelism launches on one rank, without the exchange: a call a shard, merged.

Every rank holds two chunks of the sequence: the one of its number, and the one as far from the end. Of its own shard it
sees the causal part, of an earlier rank's the first half with all rows, of a later rank's all with the second half of
its rows. Backward, each call is given the merged result, and gradients add up in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class _Launch:
    """Some of the rank's rows with the keys of one shard, which lie at `parts` of all keys."""

    rows: slice
    parts: tuple[slice, ...]
    keys: torch.Tensor
    values: torch.Tensor
    ends: tuple[torch.Tensor, torch.Tensor]
    causal: bool

    @property
    def sizes(self) -> tuple[int, int, float, bool]:
        """As the operators take them: longest rows, longest keys, dropout, causal."""
        return self.rows.stop - self.rows.start, len(self.keys), 0.0, self.causal


def attention_of_rank(
    world: int, rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A call -> out, as q, of a rank whose q is [2 * chunk, heads, d], in 16 bit on a GPU.

    k and v: [keys, kv heads, d], of all ranks, or of those chunks alone that this rank sees. What the exchange would
    have brought is laid out before the call, once.
    """
    launches = tuple(_launches(world, rank, q, k.detach(), v.detach()))
    return lambda: _Rank.apply(launches, q, k, v)


def _launches(world: int, rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Iterator[_Launch]:
    chunk = len(q) // 2
    for number in range(world):
        rows = slice(chunk if number > rank else 0, 2 * chunk)
        halves = [slice(n * chunk, (n + 1) * chunk) for n in (number, 2 * world - 1 - number)]
        parts = tuple(halves[:1] if number < rank else halves)
        keys, values = (_cut(each, parts) for each in (k, v))
        ends = [torch.tensor([0, end], dtype=torch.int32).to(q.device) for end in (rows.stop - rows.start, len(keys))]
        yield _Launch(rows, parts, keys, values, (ends[0], ends[1]), number == rank)


def _cut(keys: torch.Tensor, parts: Sequence[slice]) -> torch.Tensor:
    """Chunks that this rank sees none of may not be among its keys, and their values do not matter."""
    chunk = parts[0].stop - parts[0].start
    return torch.cat([keys[part] if part.stop <= len(keys) else keys[:chunk] for part in parts])


class _Rank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, launches: Sequence[_Launch], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full((q.shape[1], len(q)), -math.inf, device=q.device)
        flash = torch.ops.aten._flash_attention_forward
        for each in launches:
            part, part_lse, *_ = flash(q[each.rows], each.keys, each.values, *each.ends, *each.sizes, False)
            _merge(total[each.rows], lse[:, each.rows], part, part_lse)
        out = total.to(q.dtype)
        ctx.launches, ctx.shapes = launches, (q.shape, k.shape, v.shape)
        ctx.save_for_backward(q, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(s, dtype=torch.float32, device=q.device) for s in ctx.shapes)
        no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
        for each in ctx.launches:
            given = (grads[0][each.rows], q[each.rows], each.keys, each.values, out[each.rows])
            ends = (lse[:, each.rows].contiguous(), *each.ends)
            flash = torch.ops.aten._flash_attention_backward
            rows, *of_keys = flash(*given, *ends, *each.sizes, no_dropout, no_dropout[:0])
            dq[each.rows] += rows
            _spread(dk, of_keys[0], each.parts)
            _spread(dv, of_keys[1], each.parts)
        return None, dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _spread(total: torch.Tensor, grad: torch.Tensor, parts: Sequence[slice]) -> None:
    for part, each in zip(parts, grad.split(parts[0].stop - parts[0].start), strict=True):
        if part.stop <= len(total):
            total[part] += each


def _merge(out: torch.Tensor, lse: torch.Tensor, more: torch.Tensor, more_lse: torch.Tensor) -> None:
    total = torch.logaddexp(lse, more_lse)
    for each, share in ((out, lse), (more, more_lse)):
        weight = (share - total).exp().nan_to_num(0.0).t()[..., None]
        out.copy_(out * weight if each is out else out + more * weight)
    lse.copy_(total)

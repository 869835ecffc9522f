"""Zigzag attention as it was first written, for benchmarks to compare with: nothing is planned, everything is moved.

A step gathers some heads of k and v, puts them into true order by slices and one cat, and for the early chunks and for
the late ones concatenates the keys that each sequence's chunk sees, makes one varlen call, and scatters out and lse to
where the rows were. Offsets are read from the device, sequence by sequence. Backward, gradients of keys are added in
the dtype of k, put back into gathered order, and reduced in that dtype. The varlen calls are those of a backend of
grouped attention, with plans made ahead: only what is around them differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from refgrid_solutions.grouped_attention import GroupedAttnPlan, backends, plan_grouped_attn
from refgrid_solutions.grouped_attention.zigzag import Exchange

Tensors = tuple[torch.Tensor, ...]


class Setting(NamedTuple):
    """Offsets of sequences as the function was told them: tensors on the device, of this rank and of all ranks."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    stride: int
    exchange: Exchange
    backend: str = "auto"


def origin_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting) -> torch.Tensor:
    """Causal; q, k, v of this rank -> out as q, differentiable."""
    out: torch.Tensor = _Origin.apply(q, k, v, setting)
    return out


class _Origin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting) -> torch.Tensor:
        out, lse = _forward(q, k, v, setting)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.setting = setting
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[Any, ...]:
        return *_backward((dout, *ctx.saved_tensors), ctx.setting), None


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting) -> Tensors:
    rows = _rows(setting)
    outs, lses = [], []
    for q_heads, _, keys, values in _steps(q, k, v, setting):
        own = q[:, q_heads]
        out = torch.empty_like(own, memory_format=torch.contiguous_format)
        lse = own.new_empty(own.shape[1], own.shape[0], dtype=_lse_dtype(q))
        for half, indices in enumerate(rows):
            told = _call(half, setting)
            part = own[indices], _cat(keys, told), _cat(values, told)
            backend, *planned = _planned(part[0], part[1], told, setting)
            out[indices], lse[:, indices] = backend.forward(*part, *planned)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=1), torch.cat(lses)


def _backward(tensors: Tensors, setting: Setting) -> Tensors:
    dout, q, k, v, out, lse = tensors
    rows, dqs, dkvs = _rows(setting), [], []
    for heads, _, keys, values in _steps(q, k, v, setting):
        dq = torch.empty_like(q[:, heads], memory_format=torch.contiguous_format)
        sums = torch.zeros(2, *keys.shape, dtype=keys.dtype, device=keys.device)
        for half, indices in enumerate(rows):
            told = _call(half, setting)
            d_rows, own, out_rows = (tensor[:, heads][indices] for tensor in (dout, q, out))
            part = own, _cat(keys, told), _cat(values, told), out_rows, lse[heads][:, indices]
            backend, *planned = _planned(own, part[1], told, setting)
            dq[indices], *of_keys = backend.backward(d_rows, *part, *planned)
            _added(sums, of_keys, told)
        dqs.append(dq)
        dkvs.append(_reduced(sums, setting))
    dk, dv = torch.cat(dkvs, dim=2)
    return torch.cat(dqs, dim=1), dk, dv


class _Told(NamedTuple):
    """Of one call: where each sequence begins in the keys of all ranks, and offsets of its rows and keys alone."""

    starts: tuple[int, ...]
    rows: tuple[int, ...]
    keys: tuple[int, ...]


def _steps(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, setting: Setting
) -> Iterator[tuple[slice, slice, torch.Tensor, torch.Tensor]]:
    """Heads of q and of k, and keys and values of all ranks in true order; those of the next step are on their way."""
    share, world_size = q.shape[1] // k.shape[1], setting.exchange.world_size
    all_heads = [slice(first, first + setting.stride) for first in range(0, k.shape[1], setting.stride)]
    shape = (world_size * 2, len(k), setting.stride, k.shape[2])
    buffers = [k.new_empty(shape), k.new_empty(shape)]

    def sent(index: int) -> tuple[torch.Tensor, Any]:
        part = torch.stack((k[:, all_heads[index]], v[:, all_heads[index]]))
        return part, setting.exchange.gather(buffers[index % 2], part)

    part, pending = sent(0)
    for index, heads in enumerate(all_heads):
        pending.wait()
        arrived = buffers[index % 2]
        if index + 1 < len(all_heads):
            part, pending = sent(index + 1)
        keys, values = (_in_true_order(arrived[which::2], setting) for which in (0, 1))
        yield slice(heads.start * share, heads.stop * share), heads, keys, values
    del part


def _in_true_order(gathered: torch.Tensor, setting: Setting) -> torch.Tensor:
    """[world_size, rows, ...] -> [all rows, ...], by a slice a chunk."""
    pieces = []
    for start, end in pairwise(setting.cu_seqlens_q.tolist()):
        chunk = (end - start) // 2
        pieces += [gathered[rank, start : start + chunk] for rank in range(len(gathered))]
        pieces += [gathered[rank, start + chunk : end] for rank in reversed(range(len(gathered)))]
    return torch.cat(pieces)


def _in_gathered_order(whole: torch.Tensor, setting: Setting) -> torch.Tensor:
    """[..., all rows, heads, d] -> [world_size, ..., rows, heads, d]: undoes it."""
    world_size = setting.exchange.world_size
    offsets = setting.cu_seqlens_k.tolist()
    ranks = []
    for rank in range(world_size):
        pieces = []
        for start, end in pairwise(offsets):
            chunk = (end - start) // (2 * world_size)
            for number in (rank, 2 * world_size - 1 - rank):
                pieces.append(whole[:, start + number * chunk : start + (number + 1) * chunk])
        ranks.append(torch.cat(pieces, dim=1))
    return torch.stack(ranks)


def _rows(setting: Setting) -> list[torch.Tensor]:
    """Indices of the rows of all early chunks, and of all late ones."""
    device = setting.cu_seqlens_q.device
    halves: list[list[torch.Tensor]] = [[], []]
    for start, end in pairwise(setting.cu_seqlens_q.tolist()):
        middle = (start + end) // 2
        halves[0].append(torch.arange(start, middle, device=device))
        halves[1].append(torch.arange(middle, end, device=device))
    return [torch.cat(half) for half in halves]


def _call(half: int, setting: Setting) -> _Told:
    """Read from the device sequence by sequence, for every call anew."""
    world_size, rank = setting.exchange.world_size, setting.exchange.rank
    number = 2 * world_size - 1 - rank if half else rank
    starts, lengths = [], []
    for sequence in range(len(setting.cu_seqlens_k) - 1):
        start, end = int(setting.cu_seqlens_k[sequence].item()), int(setting.cu_seqlens_k[sequence + 1].item())
        starts.append(start)
        lengths.append((end - start) // (2 * world_size))
    rows = [0, *accumulate(lengths)]
    return _Told(tuple(starts), tuple(rows), tuple((number + 1) * row for row in rows))


def _cat(keys: torch.Tensor, told: _Told) -> torch.Tensor:
    """The keys that this half sees of each sequence."""
    counts = (end - start for start, end in pairwise(told.keys))
    return torch.cat([keys[start : start + count] for start, count in zip(told.starts, counts, strict=True)])


def _added(sums: torch.Tensor, of_keys: Sequence[torch.Tensor], told: _Told) -> None:
    for total, part in zip(sums, of_keys, strict=True):
        for start, (first, end) in zip(told.starts, pairwise(told.keys), strict=True):
            total[start : start + end - first] += part[first:end]


def _reduced(sums: torch.Tensor, setting: Setting) -> torch.Tensor:
    """[2, rows, heads, d] of this rank, in the dtype of the keys."""
    whole = _in_gathered_order(sums, setting)
    part = torch.empty_like(whole[0])
    setting.exchange.reduce_scatter(part, whole.flatten(0, 1)).wait()
    return part


def _planned(q: torch.Tensor, k: torch.Tensor, told: _Told, setting: Setting) -> tuple[Any, ...]:
    """The backend and what it is told; a varlen kernel would be told offsets on the device, which are there already."""
    scale = q.shape[2] ** -0.5
    sizes = (q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device)
    plan, name = _plan(told.rows, told.keys, sizes, setting.backend)
    return backends.load(name), plan, scale


@lru_cache(maxsize=64)
def _plan(
    rows: tuple[int, ...], keys: tuple[int, ...], sizes: tuple[Any, ...], backend: str
) -> tuple[GroupedAttnPlan, str]:
    names = ("num_heads_q", "num_heads_k", "head_dim", "dtype", "device")
    named = dict(zip(names, sizes, strict=True))
    causal = [1] * (len(rows) - 1)
    plan = plan_grouped_attn(
        list(pairwise(rows)), list(pairwise(keys)), causal, total_q=rows[-1], total_k=keys[-1], **named
    )
    return plan, plan.prepare(backend)


def _lse_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32

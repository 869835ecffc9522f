"""Rows and keys of a large grouped attention, each computed from its definition alone: no score matrix is whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from naive_grouped import Entry, attend, dense_mask, flash, hold_to_twice

from refgrid_solutions.grouped_attention.ranges import Slice

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Run(NamedTuple):
    """A forward and backward pass: what went in and what came out; heads as in q, k and v."""

    entries: list[Entry]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def hold_rows(run: Run, count: int = 64, *, large: bool = False) -> None:
    """out, lse and dq of sampled rows by the rule of twice the error, the first and last of each slice among them.

    large: of large scores, where the error is that of a flash kernel.
    """
    rows = _sample([entry[:2] for entry in run.entries], len(run.q), count)
    found = run.out[rows], run.dq[rows], run.lse[:, rows].T
    lows = _stacked([(_flash_row if large else _row)(run, row) for row in rows])
    truth = _double(run)
    truths = _stacked([_row(truth, row) for row in rows])
    rms = 2 if large else 1.5
    hold_to_twice("out of sampled rows", found[0], lows[0], truths[0], rms=rms, by_row=True)
    hold_to_twice("dq of sampled rows", found[1], lows[1], truths[1], rms=rms)
    hold_lse(found[2], truths[2])


def hold_keys(run: Run, count: int = 32, *, large: bool = False) -> None:
    """dk and dv of sampled keys by the rule of twice the error, from lse and out as they were found.

    large: of large scores, where the error is that of a flash kernel, and the truth has an out and lse of its own: most
    of such an error comes from the rounding of out.
    """
    keys = _sample([entry[2:4] for entry in run.entries], len(run.k), count)
    truth = _with_true_rows(run) if large else _double(run)
    lows = _stacked([(_flash_key if large else _key)(run, key) for key in keys])
    truths = _stacked([_key(truth, key) for key in keys])
    for name, found, low, true in zip(("dk", "dv"), (run.dk[keys], run.dv[keys]), lows, truths, strict=True):
        hold_to_twice(f"{name} of sampled keys", found, low, true, largest=3, rms=2 if large else 1.5)


def hold_same_bits(once: Run, again: Run) -> None:
    """What came out of two runs of the same inputs, gradients among it."""
    for name in ("out", "lse", "dq", "dk", "dv"):
        one, other = getattr(once, name), getattr(again, name)
        assert torch.equal(one, other), f"{(one != other).sum()} elements of {name} have other bits the second time"


def hold_lse(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Within 1e-3, and 1e-5 of its size where that is large; -inf where and only where it should be."""
    assert torch.equal(found.isneginf(), truth.isneginf()), "lse is -inf elsewhere than it should be"
    seen = ~truth.isneginf()
    off, limit = (found.double() - truth)[seen].abs(), 1e-3 + 1e-5 * truth[seen].abs()
    assert (off <= limit).all(), f"lse is off by {off.max():.2e}, but should be by at most {limit.min():.2e}"


def _sample(ranges: list[tuple[int, ...]], total: int, count: int) -> list[int]:
    """The ends of all ranges, as far as they fit, and others."""
    generator = random.Random(0)
    ends = sorted({place for start, end in ranges for place in (start, end - 1) if start < end})
    chosen = set(ends if len(ends) <= count // 2 else generator.sample(ends, count // 2))
    return sorted(chosen | set(generator.sample(range(total), min(total, count - len(chosen)))))


def _stacked(found: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    return [torch.stack(values) for values in zip(*found, strict=True)]


def _double(run: Run) -> Run:
    return Run(run.entries, *(tensor.double() for tensor in run[1:]))


def _row(run: Run, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out and dq [heads, d] and lse [heads] of one row, in the tensors' dtype."""
    told, mask, scale, dout = _of_row(run, row)
    q = told[0].clone().requires_grad_()
    out, lse = attend(q, *told[1:], mask, scale)
    (dq,) = torch.autograd.grad(out, q, dout)
    return out[0].detach(), dq[0], lse[:, 0].detach()


def _flash_row(run: Run, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same as a flash kernel gives it."""
    told, mask, scale, dout = _of_row(run, row)
    out, lse, dq, *_ = flash(*told, mask, scale, dout)
    return out[0], dq[0], lse[:, 0]


def _of_row(run: Run, row: int) -> tuple[Tensors, torch.Tensor, float, torch.Tensor]:
    """The row of q and what it sees of k and v, a mask, the scale, and the row of dout."""
    start, end = next(((piece.k_start, piece.k_start + seen) for piece, seen in _seen(run, row)), (0, 0))
    mask = torch.ones(1, end - start, dtype=torch.bool, device=run.q.device)
    told = run.q[row : row + 1], run.k[start:end], run.v[start:end]
    return told, mask, run.q.shape[2] ** -0.5, run.dout[row : row + 1]


def _seen(run: Run, row: int) -> list[tuple[Slice, int]]:
    pieces = [Slice(*entry) for entry in run.entries if entry[0] <= row < entry[1]]
    return [(piece, _count(piece, row)) for piece in pieces]


def _count(piece: Slice, row: int) -> int:
    """Keys that the row of q sees, from the definition of the masks."""
    last = piece.k_end - (piece.q_end - 1 - row) if piece.mask_type else piece.k_end
    return max(last - piece.k_start, 0)


def _key(run: Run, key: int, weights: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv [heads, d] of one key, in the tensors' dtype; weights and their gradients rounded to another."""
    heads, scale = run.q.shape[1] // run.k.shape[1], run.q.shape[2] ** -0.5
    rows = _rows_that_see(run, key)
    q, dout, out, lse = run.q[rows], run.dout[rows], run.out[rows], run.lse[:, rows].T
    k, v = (keys[key].repeat_interleave(heads, dim=0) for keys in (run.k, run.v))
    p = ((q * k).sum(-1) * scale - lse).exp().to(q.dtype)
    ds = p * ((dout * v).sum(-1) - (dout * out).sum(-1)) * scale
    ds, p = (each.to(weights or q.dtype).to(q.dtype) for each in (ds, p))
    dk, dv = (ds[..., None] * q).sum(0), (p[..., None] * dout).sum(0)
    return dk.unflatten(0, (-1, heads)).sum(1), dv.unflatten(0, (-1, heads)).sum(1)


def _flash_key(run: Run, key: int) -> tuple[torch.Tensor, ...]:
    """The same as a flash kernel gives it, which sums in float32."""
    wide = Run(run.entries, *(tensor.float() for tensor in run[1:]))
    return tuple(gradient.to(run.q.dtype) for gradient in _key(wide, key, run.q.dtype))


def _with_true_rows(run: Run, block: int = 256) -> Run:
    """In float64, out and lse computed anew: so many rows at a time, over all keys."""
    wide, scale = _double(run), run.q.shape[2] ** -0.5
    mask = dense_mask(run.entries, len(run.q), len(run.k), str(run.q.device))
    parts = zip(wide.q.split(block), mask.split(block), strict=True)
    outs, sums = zip(*(attend(q, wide.k, wide.v, seen, scale) for q, seen in parts), strict=True)
    return wide._replace(out=torch.cat(outs), lse=torch.cat(sums, dim=1))


def _rows_that_see(run: Run, key: int) -> torch.Tensor:
    parts = [torch.arange(0)]
    for q_start, q_end, k_start, k_end, mask_type in run.entries:
        if k_start <= key < k_end:
            first = max(q_start, q_end - (k_end - key)) if mask_type else q_start
            parts.append(torch.arange(first, q_end))
    return torch.cat(parts).to(run.q.device)

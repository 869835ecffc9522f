"""The launches of a backward pass: rows summarized, then gradients of rows and those of keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from refgrid_solutions.grouped_attention.backends.triton.configurations import Configuration, Tiles
from refgrid_solutions.grouped_attention.backends.triton.gradients import of_keys, of_rows, summarize
from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, described

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Work(NamedTuple):
    """Tiles of rows, pieces, tiles of keys and their runs; the places of rows' statistics, the heads of a section."""

    rows: torch.Tensor
    pieces: torch.Tensor
    keys: torch.Tensor
    runs: torch.Tensor
    places: int
    section: int


class Told(NamedTuple):
    """Tensors [n, heads, head_dim], loadable, none of them empty, and what rows need: [2, heads, places] float32."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    stats: torch.Tensor

    @property
    def group(self) -> int:
        """How many query heads share a head of k."""
        heads, shared = int(self.q.shape[1]), int(self.k.shape[1])
        return heads // shared

    def described(self, tiles: Tiles) -> tuple[TensorDescriptor, ...]:
        """As q, k, v and dout, for loads of tiles of that size."""
        sizes = (tiles.rows, tiles.keys, tiles.keys, tiles.rows)
        return tuple(described(*pair) for pair in zip((self.q, self.k, self.v, self.dout), sizes, strict=True))


def differentiated(
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    work: Work,
    sizes: Configuration,
) -> Gradients:
    """dq, dk and dv from dout, q, k and v, loadable and not empty; out and lse are dense."""
    dout, q, k, v = tensors
    told = Told(dout, q, k, v, _summarized(out, dout, lse, work, sizes.of_rows))
    return _of_rows(told, scale, work, sizes.of_rows), *_of_keys(told, scale, work, sizes.of_keys)


def _summarized(out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, work: Work, tiles: Tiles) -> torch.Tensor:
    count, heads, width = out.shape
    stats = lse.new_empty((2, heads, work.places))
    summarize[len(work.rows), heads](
        *(out, dout, lse, stats, work.rows, count, heads, work.places, dout.stride(0), dout.stride(1)),
        *(tiles.rows, width),
    )
    return stats


def _of_rows(told: Told, scale: float, work: Work, tiles: Tiles) -> torch.Tensor:
    _, heads, width = told.q.shape
    dq = told.q.new_empty(told.q.shape)
    of_rows[(len(work.rows) * heads,)](
        *(*told.described(tiles), told.stats, dq, work.rows, scale, scale * LOG2_E),
        *(len(work.rows), heads, work.section * told.group, told.group, work.places),
        *(tiles.rows, tiles.keys, width, tiles.stages),
        num_warps=tiles.warps,
    )
    return dq


def _of_keys(told: Told, scale: float, work: Work, tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    count, heads, width = told.k.shape
    dk, dv = told.k.new_empty(told.k.shape), told.v.new_empty(told.v.shape)
    stats = (TensorDescriptor(part, list(part.shape), list(part.stride()), [1, tiles.rows]) for part in told.stats)
    of_keys[(len(work.keys) * heads,)](
        *(*told.described(tiles), *stats),
        *(dk, dv, work.keys, work.runs, work.pieces, scale, scale * LOG2_E),
        *(len(work.keys), heads, work.section, told.group, count),
        *(tiles.rows, tiles.keys, width, tiles.stages),
        num_warps=tiles.warps,
    )
    return dk, dv

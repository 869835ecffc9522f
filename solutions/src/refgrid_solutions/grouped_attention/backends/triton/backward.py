"""The launches of a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from refgrid_solutions.grouped_attention.backends.triton.configurations import Configuration, Tiles
from refgrid_solutions.grouped_attention.backends.triton.gradients import of_keys, of_rows, summarize
from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, described

def differentiated(
    told: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    work: Sequence[torch.Tensor],
    section: int,
    sizes: Configuration,
    places: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv; told: dout, q, k and v, loadable, none of them empty. work: for rows, for keys, and the keys' runs.

    places: how many the statistics of rows take.
    """
    dout, q, k, v = told
    rows, keys, runs = work
    stats = _summarized(out.contiguous(), dout, lse.contiguous(), rows, places, sizes.of_rows.rows)
    dq = _of_rows(dout, q, k, v, stats, scale, rows, section, sizes.of_rows)
    dk, dv = _of_keys(dout, q, k, v, stats, scale, (keys, runs), section, sizes.of_keys)
    return dq, dk, dv


def _summarized(
    out: torch.Tensor, dout: torch.Tensor, lse: torch.Tensor, work: torch.Tensor, places: int, tile_rows: int
) -> torch.Tensor:
    count, heads, width = out.shape
    stats = lse.new_empty((2, heads, places))
    summarize[len(work), heads](
        *(out, dout, lse, stats, work, count, heads, places, dout.stride(0), dout.stride(1)), tile_rows, width
    )
    return stats


def _of_rows(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    work: torch.Tensor,
    section: int,
    tiles: Tiles,
) -> torch.Tensor:
    _, heads, width = q.shape
    group = heads // k.shape[1]
    dq = q.new_empty(q.shape)
    of_rows[tiles.grid(len(work) * heads, q.device)](
        *(described(q, tiles.rows), described(k, tiles.keys), described(v, tiles.keys), described(dout, tiles.rows)),
        *(stats, dq, work, scale, scale * LOG2_E, len(work), heads, section * group, group, stats.shape[2]),
        *(tiles.rows, tiles.keys, width, tiles.stages),
        num_warps=tiles.warps,
    )
    return dq


def _of_keys(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    stats: torch.Tensor,
    scale: float,
    work: tuple[torch.Tensor, torch.Tensor],
    section: int,
    tiles: Tiles,
) -> tuple[torch.Tensor, torch.Tensor]:
    count, heads, width = k.shape
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    lse, delta = (TensorDescriptor(part, list(part.shape), list(part.stride()), [1, tiles.rows]) for part in stats)
    of_keys[tiles.grid(len(work[0]) * heads, k.device)](
        *(described(q, tiles.rows), described(k, tiles.keys), described(v, tiles.keys), described(dout, tiles.rows)),
        *(lse, delta, dk, dv, *work, scale, scale * LOG2_E, len(work[0]), heads, section, q.shape[1] // heads, count),
        *(tiles.rows, tiles.keys, width, tiles.stages),
        num_warps=tiles.warps,
    )
    return dk, dv

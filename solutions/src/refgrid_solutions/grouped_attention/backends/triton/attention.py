"""The forward kernel: a program takes a tile of rows from the work list, and walks over its keys.

A tile's blocks of keys come in two loops: those that all of its rows see, then those that need a mask.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from refgrid_solutions.grouped_attention.backends.triton.configurations import Tiles
from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, described, head_and_tile

_LN_2 = tl.constexpr(1 / LOG2_E)


@triton.jit
def _softmax(
    scores: tl.tensor,
    largest: tl.tensor,
    total: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    place: tl.tensor,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tuple:
    """Weights of a block, not yet divided: exponents to base 2, relative to the largest score so far."""
    if MASKED:
        scores = tl.where(place + tl.arange(0, KEYS)[None, :] < seen[:, None], scores, -float("inf"))
    now = tl.maximum(largest, tl.max(scores, 1) * scale)
    base = now
    if MASKED:  # a row that has seen no key yet
        base = tl.where(now == -float("inf"), 0.0, now)
    weights = tl.exp2(scores * scale - base[:, None])
    shrink = tl.exp2(largest - base)
    return weights, shrink, now, total * shrink + tl.sum(weights, 1)


@triton.jit
def _step(
    state: tl.tuple,
    rows: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    head: tl.tensor,
    key: tl.tensor,
    block: tl.tensor,
    seen: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tuple:
    """One block of keys: its scores, its weights, and what it adds to the sums of values."""
    sums, total, largest = state
    width: tl.constexpr = sums.shape[1]
    k = k_desc.load([head, key + block * KEYS, 0]).reshape(KEYS, width)
    scores = tl.dot(rows, k.T)
    weights, shrink, largest, total = _softmax(scores, largest, total, seen, scale, block * KEYS, MASKED, KEYS)
    v = v_desc.load([head, key + block * KEYS, 0]).reshape(KEYS, width)
    return tl.dot(weights.to(v.dtype), v, sums * shrink[:, None]), total, largest


@triton.jit
def one_tile(
    item: tl.tensor,
    tensors: tl.tuple,
    scale: tl.tensor,
    counts: tl.tuple,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """All of one item of the work list; tensors and counts as attend has them."""
    q_desc, k_desc, v_desc, out, lse, work = tensors
    num_tiles, heads, section, group, total_q = counts
    head, tile = head_and_tile(item, num_tiles, heads, section)
    work_at = work + tile * 8
    row, count, key = tl.load(work_at), tl.load(work_at + 1), tl.load(work_at + 2)
    whole, masked = tl.load(work_at + 3), tl.load(work_at + 4)
    offsets = tl.arange(0, ROWS)
    seen = tl.minimum(offsets + tl.load(work_at + 5), tl.load(work_at + 6))
    rows = q_desc.load([head, row, 0]).reshape(ROWS, WIDTH)
    state = (
        tl.zeros([ROWS, WIDTH], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], -float("inf"), tl.float32),
    )
    for block in tl.range(0, whole, num_stages=STAGES):
        state = _step(state, rows, k_desc, v_desc, head // group, key, block, seen, scale, False, KEYS)
    for block in tl.range(whole, whole + masked, num_stages=STAGES):
        state = _step(state, rows, k_desc, v_desc, head // group, key, block, seen, scale, True, KEYS)
    sums, total, largest = state
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    # Not by the copy engine: below the tile's last row is another slice, which another program writes.
    at = (row.to(tl.int64) * heads + head) * WIDTH
    place = at + offsets[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(out + place, (sums / total[:, None]).to(out.dtype.element_ty), mask=(offsets < count)[:, None])
    logarithm = tl.where(blind, -float("inf"), (largest + tl.log2(total)) * _LN_2)
    tl.store(lse + head.to(tl.int64) * total_q + row + offsets, logarithm, mask=offsets < count)


@triton.jit(do_not_specialize=["num_tiles", "heads", "section", "group", "total_q"])
def attend(
    q_desc: tl.tensor_descriptor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    out: tl.tensor,
    lse: tl.tensor,
    work: tl.tensor,
    scale: tl.tensor,
    num_tiles: tl.tensor,
    heads: tl.tensor,
    section: tl.tensor,
    group: tl.tensor,
    total_q: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """q [heads, total_q, WIDTH], k and v [heads / group, total_k, WIDTH] -> out [total_q, heads, WIDTH], lse.

    work: row_tiles. scale: of the scores, positive, times log2(e). section: heads that are taken together.
    """
    tensors, counts = (q_desc, k_desc, v_desc, out, lse, work), (num_tiles, heads, section, group, total_q)
    one_tile(tl.program_id(0), tensors, scale, counts, ROWS, KEYS, WIDTH, STAGES)


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, work: torch.Tensor, section: int, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [total_q, heads, head_dim] and lse [heads, total_q], by one launch; q, k and v are loadable and not empty."""
    count, heads, width = q.shape
    group = heads // k.shape[1]
    out = q.new_empty((count, heads, width))
    lse = q.new_empty((heads, count), dtype=torch.float32)
    attend[(len(work) * heads,)](
        *(described(q, tiles.rows), described(k, tiles.keys), described(v, tiles.keys)),
        *(out, lse, work, scale * LOG2_E, len(work), heads, section * group, group, count),
        *(tiles.rows, tiles.keys, width, tiles.stages),
        num_warps=tiles.warps,
    )
    return out, lse

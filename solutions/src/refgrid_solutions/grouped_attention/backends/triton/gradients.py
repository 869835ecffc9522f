"""The backward kernels: gradients of keys, and of rows.

A tile of keys belongs to one program, with all rows of all slices and of all query heads that see it. So slices that
share keys, and query heads that share a head of k, need no more than longer sums: those stay in registers and are
written once. Gradients of rows are sums of the same kind in a kernel of their own, which computes the weights once
more: on an H200 that took less time than to add them up in memory from the kernel of the keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from refgrid_solutions.grouped_attention.backends.triton.items import LOG2_E, head_and_tile

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit(do_not_specialize=["total_q", "heads", "places"])
def summarize(
    out: tl.tensor,
    dout: tl.tensor,
    lse: tl.tensor,
    stats: tl.tensor,
    work: tl.tensor,
    total_q: tl.tensor,
    heads: tl.tensor,
    places: tl.tensor,
    dout_row: tl.tensor,
    dout_head: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Of a tile of rows what both other kernels need: stats [2, heads, places] float32, lse to base 2 and dout * out.

    work: row_tiles. out and lse are dense.
    """
    work_at, head = work + tl.program_id(0) * 8, tl.program_id(1).to(tl.int64)
    row, count, place = tl.load(work_at), tl.load(work_at + 1), tl.load(work_at + 7)
    offsets, columns = tl.arange(0, ROWS), tl.arange(0, WIDTH)[None, :]
    rows, real = row.to(tl.int64) + offsets, offsets < count
    values = tl.load(out + (rows * heads + head)[:, None] * WIDTH + columns, mask=real[:, None], other=0.0)
    d_values = tl.load(dout + (rows * dout_row + head * dout_head)[:, None] + columns, mask=real[:, None], other=0.0)
    logarithm = tl.load(lse + head * total_q + rows, mask=real, other=0.0) * _LOG2_E
    at = stats + head * places + place + offsets
    tl.store(at, logarithm, mask=real)
    delta = tl.sum(values.to(tl.float32) * d_values.to(tl.float32), 1)
    tl.store(at + heads.to(tl.int64) * places, delta, mask=real)


@triton.jit
def _six(at: tl.tensor) -> tl.tuple:
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)


@triton.jit
def run_of(
    row: tl.tensor,
    last_row: tl.tensor,
    first_key: tl.tensor,
    num_keys: tl.tensor,
    diagonal: tl.tensor,
    last_place: tl.tensor,
    key: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tuple:
    """Which rows of a piece see the tile of keys that begins with key, in blocks that end where the piece ends.

    -> the first block's first row, which may be above the piece or even above row 0, and its place; blocks that need a
    mask, then blocks whose rows see all of the tile; what _hidden must know of the piece.
    """
    last_key = first_key + num_keys
    lowest, highest = tl.maximum(first_key, key), tl.minimum(last_key, key + KEYS)
    above = tl.maximum(lowest - first_key + 1 - diagonal, 0)
    not_all = tl.maximum(highest - first_key - diagonal, 0)
    blocks = tl.cdiv(last_row - row - above, ROWS)
    whole = tl.where(highest - lowest == KEYS, (last_row - row - not_all) // ROWS, 0)
    bounds = row, first_key, last_key, diagonal + first_key - row
    return last_row - blocks * ROWS, last_place - blocks * ROWS, blocks - whole, whole, bounds


@triton.jit
def _place(step: tl.tensor, masked: tl.tensor, whole: tl.tensor, group: tl.tensor) -> tl.tuple:
    """Of a run's step: which query head, and which block of rows. Masked blocks of all heads come first."""
    late = step >= masked * group
    count = tl.where(late, whole, masked)
    step -= tl.where(late, masked * group, 0)
    return step // count, step % count + tl.where(late, masked, 0)


@triton.jit
def _hidden(
    rows: tl.tensor,
    keys: tl.tensor,
    first_row: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    diagonal: tl.tensor,
) -> tl.tensor:
    """[keys, rows]: which pairs the slice of a run does not have. A row of it sees keys < row + diagonal."""
    end = tl.where(rows < first_row, first_key, tl.minimum(rows + diagonal, last_key))
    return (keys[:, None] < first_key) | (keys[:, None] >= end[None, :])


@triton.jit
def _key_step(
    sums: tl.tuple,
    k: tl.tensor,
    v: tl.tensor,
    descs: tl.tuple,
    head: tl.tensor,
    row: tl.tensor,
    place: tl.tensor,
    key: tl.tensor,
    bounds: tl.tuple,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tuple:
    """What one block of rows adds to the gradients of a tile of keys and values.

    All is transposed, [keys, rows]: so weights and their gradients are operands that need not leave the registers.
    """
    dk, dv = sums
    q_desc, dout_desc, lse_desc, delta_desc = descs
    keys: tl.constexpr = k.shape[0]
    width: tl.constexpr = k.shape[1]
    rows: tl.constexpr = q_desc.block_shape[1]
    q = q_desc.load([head, row, 0]).reshape(rows, width)
    scores = tl.dot(k, q.T) * scale - lse_desc.load([head, place]).reshape(rows)[None, :]
    if MASKED:
        hidden = _hidden(row + tl.arange(0, rows), key + tl.arange(0, keys), *bounds)
        scores = tl.where(hidden, -float("inf"), scores)
    weights = tl.exp2(scores)
    dout = dout_desc.load([head, row, 0]).reshape(rows, width)
    delta = delta_desc.load([head, place]).reshape(rows)
    if MASKED:  # what nobody wrote
        delta = tl.where(row + tl.arange(0, rows) < bounds[0], 0.0, delta)
    # As what the product begins with, delta needs no registers of its own.
    d_weights = tl.dot(v, dout.T, tl.zeros([keys, rows], tl.float32) - delta[None, :])
    dv = tl.dot(weights.to(dout.dtype), dout, dv)
    d_scores = (weights * d_weights).to(q.dtype)
    dk = tl.dot(d_scores, q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["num_tiles", "heads", "section", "group", "total_k"])
def of_keys(
    q_desc: tl.tensor_descriptor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    dout_desc: tl.tensor_descriptor,
    lse_desc: tl.tensor_descriptor,
    delta_desc: tl.tensor_descriptor,
    dk: tl.tensor,
    dv: tl.tensor,
    work: tl.tensor,
    runs: tl.tensor,
    pieces: tl.tensor,
    scale: tl.tensor,
    scale2: tl.tensor,
    num_tiles: tl.tensor,
    heads: tl.tensor,
    section: tl.tensor,
    group: tl.tensor,
    total_k: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dk, dv [total_k, heads, WIDTH] from k, v [heads, total_k, WIDTH], and q, dout [heads * group, total_q, WIDTH].

    work, runs: key_tiles; pieces: their table. lse and delta: of summarize. scale: of the scores, positive; scale2:
    times log2(e).
    """
    descs = q_desc, dout_desc, lse_desc, delta_desc
    head, tile = head_and_tile(tl.program_id(0), num_tiles, heads, section)
    work_at = work + tile * 3
    key = tl.load(work_at)
    k = k_desc.load([head, key, 0]).reshape(KEYS, WIDTH)
    v = v_desc.load([head, key, 0]).reshape(KEYS, WIDTH)
    sums = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    for index in tl.range(tl.load(work_at + 1), tl.load(work_at + 2)):
        piece = _six(pieces + tl.load(runs + index) * 6)
        row, place, masked, whole, bounds = run_of(*piece, key, ROWS, KEYS)
        for step in tl.range(0, masked * group, num_stages=STAGES):
            one, block = _place(step, masked, whole, group)
            at = head * group + one, row + block * ROWS, place + block * ROWS
            sums = _key_step(sums, k, v, descs, *at, key, bounds, scale2, True)
        for step in tl.range(masked * group, (masked + whole) * group, num_stages=STAGES):
            one, block = _place(step, masked, whole, group)
            at = head * group + one, row + block * ROWS, place + block * ROWS
            sums = _key_step(sums, k, v, descs, *at, key, bounds, scale2, False)
    offsets = tl.arange(0, KEYS)
    to = (key.to(tl.int64) * heads + head) * WIDTH
    place = to + offsets[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    keep = (offsets < total_k - key)[:, None]
    tl.store(dk + place, (sums[0] * scale).to(dk.dtype.element_ty), mask=keep)
    tl.store(dv + place, sums[1].to(dv.dtype.element_ty), mask=keep)


@triton.jit
def _row_step(
    dq: tl.tensor,
    q: tl.tensor,
    dout: tl.tensor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    head: tl.tensor,
    key: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    seen: tl.tensor,
    place: tl.tensor,
    scale: tl.tensor,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """What one block of keys adds to the gradients of a tile of rows."""
    rows: tl.constexpr = q.shape[0]
    width: tl.constexpr = q.shape[1]
    keys: tl.constexpr = k_desc.block_shape[1]
    k = k_desc.load([head, key, 0]).reshape(keys, width)
    scores = tl.dot(q, k.T) * scale - lse[:, None]
    if MASKED:
        scores = tl.where(place + tl.arange(0, keys)[None, :] < seen[:, None], scores, -float("inf"))
    weights = tl.exp2(scores)
    v = v_desc.load([head, key, 0]).reshape(keys, width)
    d_weights = tl.dot(dout, v.T, tl.zeros([rows, keys], tl.float32) - delta[:, None])
    return tl.dot((weights * d_weights).to(k.dtype), k, dq)


@triton.jit(do_not_specialize=["num_tiles", "heads", "section", "group", "places"])
def of_rows(
    q_desc: tl.tensor_descriptor,
    k_desc: tl.tensor_descriptor,
    v_desc: tl.tensor_descriptor,
    dout_desc: tl.tensor_descriptor,
    stats: tl.tensor,
    dq: tl.tensor,
    work: tl.tensor,
    scale: tl.tensor,
    scale2: tl.tensor,
    num_tiles: tl.tensor,
    heads: tl.tensor,
    section: tl.tensor,
    group: tl.tensor,
    places: tl.tensor,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dq [total_q, heads, WIDTH] from q, dout [heads, total_q, WIDTH] and k, v [heads / group, total_k, WIDTH].

    work: row_tiles. stats: of summarize. scale: of the scores, positive; scale2: times log2(e).
    """
    head, tile = head_and_tile(tl.program_id(0), num_tiles, heads, section)
    work_at = work + tile * 8
    row, count, key = tl.load(work_at), tl.load(work_at + 1), tl.load(work_at + 2)
    whole, masked = tl.load(work_at + 3), tl.load(work_at + 4)
    offsets = tl.arange(0, ROWS)
    seen = tl.minimum(offsets + tl.load(work_at + 5), tl.load(work_at + 6))
    at = stats + head.to(tl.int64) * places + tl.load(work_at + 7)
    lse = tl.load(at + offsets, mask=offsets < count, other=float("inf"))
    delta = tl.load(at + heads.to(tl.int64) * places + offsets, mask=offsets < count, other=0.0)
    q = q_desc.load([head, row, 0]).reshape(ROWS, WIDTH)
    dout = dout_desc.load([head, row, 0]).reshape(ROWS, WIDTH)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    for block in tl.range(0, whole, num_stages=STAGES):
        place = block * KEYS
        sums = _row_step(
            *(sums, q, dout, k_desc, v_desc, head // group, key + place, lse, delta, seen, place, scale2, False)
        )
    for block in tl.range(whole, whole + masked, num_stages=STAGES):
        place = block * KEYS
        sums = _row_step(
            *(sums, q, dout, k_desc, v_desc, head // group, key + place, lse, delta, seen, place, scale2, True)
        )
    to = (row.to(tl.int64) * heads + head) * WIDTH
    place = to + offsets[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :]
    tl.store(dq + place, (sums * scale).to(dq.dtype.element_ty), mask=(offsets < count)[:, None])

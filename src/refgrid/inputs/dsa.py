"""Inputs of DeepSeek sparse attention: choices of slots, caches that hold NaN where nothing reads, packed fp8 keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.inputs import normal, paged

if TYPE_CHECKING:
    from refgrid.inputs.drawing import Drawing, Value

NAN_BYTE = -1  # 0xFF: a NaN of float8_e4m3fn, and four of them one of float32
SCALE_BYTES = 4
# Lengths around a page, around what the indexer chooses, and none.
LENGTHS = (0, 2049, 1, 63, 2048, 65, 64, 2047, 4097)


def sparse_indices(drawing: Drawing, name: str) -> Value:
    """Distinct slots of each token in an order of its own, and -1 behind them or, in every other row, among them.

    Token 0 has as many slots as there are, of three tokens one has none. A quarter of the slots is read by nobody.
    """
    (tokens, topk), generator = drawing.shape(name), drawing.generator(name)
    slots = drawing.axis(name, "num_pages") * drawing.axis(name, "page_size")
    if tokens and not slots:
        raise drawing.error(name, "needs a slot, but num_pages is 0")
    readable = torch.randperm(slots, generator=generator)[: max(1, slots - slots // 4)]
    rows = torch.full((tokens, topk), -1, dtype=torch.int32)
    for token, row in enumerate(rows):
        count = _count(token, min(topk, len(readable)), generator)
        row[:count] = readable[torch.randperm(len(readable), generator=generator)[:count]].to(torch.int32)
        if token % 2:
            row.copy_(row[torch.randperm(topk, generator=generator)].clone())
    return drawing.place(name, rows)


def _count(token: int, most: int, generator: torch.Generator) -> int:
    if token == 0:
        return most
    return 0 if token % 3 == 1 else int(torch.randint(1, most + 1, (1,), generator=generator))


def sparse_cache(drawing: Drawing, name: str) -> Value:
    """Numbers in the slots that some token reads and NaN in all others."""
    indices = drawing.known("sparse_indices", name)
    return paged.filled_cache(drawing, name, indices[indices >= 0].unique().long())


def seq_lens(drawing: Drawing, name: str) -> Value:
    """LENGTHS in turn, as far as a row of the table and the cache have room."""
    page_size = drawing.axis(name, "page_size")
    room = min(drawing.axis(name, "max_num_pages"), drawing.axis(name, "num_pages")) * page_size
    lengths = [min(room, LENGTHS[(number + 1) % len(LENGTHS)]) for number in range(drawing.shape(name)[0])]
    return drawing.place(name, torch.tensor(lengths, dtype=torch.int32))


def block_table(drawing: Drawing, name: str) -> Value:
    """Distinct pages of each sequence, shared with others where it falls so, and -1 beyond its last."""
    (batch, room), generator = drawing.shape(name), drawing.generator(name)
    pages, page_size = drawing.axis(name, "num_pages"), drawing.axis(name, "page_size")
    table = torch.full((batch, room), -1, dtype=torch.int32)
    for row, length in zip(table, drawing.known("seq_lens", name).tolist(), strict=True):
        used = -(-length // page_size)
        row[:used] = torch.randperm(pages, generator=generator)[:used].to(torch.int32)
    return drawing.place(name, table)


def fp8_numbers(drawing: Drawing, name: str) -> Value:
    """Normal numbers as float8_e4m3fn."""
    shape = drawing.shape(name)
    return drawing.place(name, _fp8(math.prod(shape), drawing.generator(name)).view(drawing.dtype(name)).view(shape))


def packed_keys(drawing: Drawing, name: str) -> Value:
    """Pages of keys and their scales, as DeepGEMM lays them out; bytes of NaN where no sequence has a key.

    Scales are from 1/8 to 1/4 in steps that float32 holds.
    """
    pages, page_size, _, width = drawing.shape(name)
    d, used, generator = width - SCALE_BYTES, _used_keys(drawing, name), drawing.generator(name)
    page, place = used // page_size, used % page_size
    cache = torch.full((pages, page_size * width), NAN_BYTE, dtype=torch.int8)
    values = cache[:, : page_size * d].unflatten(1, (page_size, d))
    scales = cache[:, page_size * d :].unflatten(1, (page_size, SCALE_BYTES))
    values[page, place] = _fp8(len(used) * d, generator).view(torch.int8).view(-1, d)
    steps = torch.randint(256, (len(used),), generator=generator)
    scales[page, place] = ((steps + 256) / 2048).float().view(torch.int8).view(-1, SCALE_BYTES)
    return drawing.place(name, cache.view(drawing.shape(name)))


def _fp8(count: int, generator: torch.Generator) -> torch.Tensor:
    """The bytes of `count` normal numbers: a table of codes, drawn from."""
    codes = normal.quantiles().to(torch.float8_e4m3fn).view(torch.uint8)
    return codes[normal.draws(count, generator)]


def _used_keys(drawing: Drawing, name: str) -> torch.Tensor:
    """Slots (page * page_size + place) in which some sequence has a key."""
    page_size, table = drawing.axis(name, "page_size"), drawing.known("block_table", name).long()
    position = torch.arange(table.shape[1] * page_size)
    held = position < drawing.known("seq_lens", name)[:, None]
    slots = table[:, position // page_size] * page_size + position % page_size
    return slots[held].unique()

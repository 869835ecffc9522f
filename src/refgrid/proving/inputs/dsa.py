"""Inputs of DeepSeek sparse attention: choices of slots, caches that hold NaN where nothing reads, packed fp8 keys.

An eighth of the slots, or pages, is read by nobody; the first and the last one are read.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs import normal, paged

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value

NAN_BYTES = (0x7F, 0xFF)  # the two NaN of float8_e4m3fn; four bytes of the second are a NaN of float32
SCALE_BYTES = 4
KEY_SCALE = 96  # standard deviation of stored keys: the largest number drawn, 400, is near the type's largest, 448
# Lengths around a page, around what the indexer chooses, and none.
LENGTHS = (0, 2049, 1, 63, 2048, 65, 64, 2047, 4097)
TIES = "ties"  # in a workload's name: its keys repeat TIED_KEYS different ones, so that scores are equal
TIED_KEYS = 16
_STRIDES = (1, 3, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def sparse_indices(drawing: Drawing, name: str) -> Value:
    """Distinct slots of each token in an order of its own, and -1 behind them or, in every other row, among them.

    Token 0 has as many slots as there are, others have few, and token 2 has none. Each row is a window of one
    permutation, from a place and at a stride of its own: so tokens share slots, as those of one sequence do.
    """
    (tokens, topk), generator = drawing.shape(name), drawing.generator(name)
    slots = drawing.axis(name, "num_pages") * drawing.axis(name, "page_size")
    if tokens and not slots:
        raise drawing.error(name, "needs a slot, but num_pages is 0")
    readable = _readable(slots, generator)
    count, place = len(readable), torch.arange(topk)
    strides = torch.tensor([stride for stride in _STRIDES if math.gcd(stride, count) == 1])
    start = torch.randint(max(1, count), (tokens, 1), generator=generator)
    stride = strides[torch.randint(len(strides), (tokens, 1), generator=generator)]
    start[:1], stride[:1] = 0, 1  # token 0 reads the first and the last slot
    keys = _counts(tokens, min(topk, count), generator)[:, None]
    rows = torch.where(place < keys, readable[(start + stride * place) % max(1, count)], -1)
    rows[1::2] = rows[1::2, torch.randperm(topk, generator=generator)]
    return drawing.place(name, rows.to(torch.int32))


def _readable(count: int, generator: torch.Generator) -> torch.Tensor:
    """Seven eighths of `count` slots or pages in random order, but for the first and the last, which lead."""
    order = torch.randperm(count, generator=generator)
    ends = torch.tensor([0, count - 1][:count], dtype=torch.int64)
    return torch.cat([ends, order[(order > 0) & (order < count - 1)]])[: count - count // 8]


def _counts(tokens: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Slots of each token: all, and in turn few, none once, and any number."""
    counts = torch.full((tokens,), most)
    few, some = (torch.randint(1, max(1, limit) + 1, (tokens,), generator=generator) for limit in (min(most, 63), most))
    counts[1::4], counts[3::4], counts[4::8], counts[2:3] = few[1::4], some[3::4], some[4::8], 0
    return counts


def sparse_cache(drawing: Drawing, name: str) -> Value:
    """Numbers in the slots that some token reads and NaN in all others."""
    read = torch.zeros(drawing.axis(name, "num_pages") * drawing.axis(name, "page_size"), dtype=torch.bool)
    indices = drawing.known("sparse_indices", name).flatten()
    read[indices[indices >= 0].long()] = True
    return paged.filled_cache(drawing, name, read.nonzero().squeeze(1))


def seq_lens(drawing: Drawing, name: str) -> Value:
    """A last page short of what there is room for, LENGTHS in turn as far as there is room, and then any length."""
    page_size, generator = drawing.axis(name, "page_size"), drawing.generator(name)
    room = min(drawing.axis(name, "max_num_pages"), drawing.axis(name, "num_pages")) * page_size
    lengths = torch.randint(room + 1, drawing.shape(name), generator=generator)
    lengths[:1] = room - lengths[:1] % page_size
    hostile = torch.tensor(LENGTHS[: max(0, len(lengths) - 1)], dtype=torch.int64)
    lengths[1 : 1 + len(hostile)] = hostile.clamp(max=room)
    return drawing.place(name, lengths.to(torch.int32))


def block_table(drawing: Drawing, name: str) -> Value:
    """Pages in random order, each of one sequence only unless there are too few.

    Beyond a sequence's last page stands -1 or, in every other row, a page that no sequence has.
    """
    (_, room), generator = drawing.shape(name), drawing.generator(name)
    used = -(-drawing.known("seq_lens", name).long() // drawing.axis(name, "page_size"))
    pages, total = _readable(drawing.axis(name, "num_pages"), generator), int(used.sum())
    held = torch.arange(room) < used[:, None]
    table = torch.full(held.shape, -1)
    if total <= len(pages):
        table[held] = pages[:total][torch.randperm(total, generator=generator)]
    else:
        every = torch.arange(drawing.axis(name, "num_pages"))  # a sequence may need all of them
        pages = pages if int(used.max()) <= len(pages) else every
        for row, count in enumerate(used.tolist()):
            table[row, :count] = pages[torch.randperm(len(pages), generator=generator)[:count]]
    spare = torch.ones(drawing.axis(name, "num_pages"), dtype=torch.bool)
    spare[table[held]] = False
    if spare.any():
        table[1::2] = torch.where(held[1::2], table[1::2], spare.nonzero()[-1])
    return drawing.place(name, table.to(torch.int32))


def fp8_numbers(drawing: Drawing, name: str) -> Value:
    """Normal numbers as float8_e4m3fn."""
    shape = drawing.shape(name)
    drawn = _fp8(math.prod(shape), drawing.generator(name), 1.0)
    return drawing.place(name, drawn.view(drawing.dtype(name)).view(shape))


def packed_keys(drawing: Drawing, name: str) -> Value:
    """Pages of keys and their scales, as DeepGEMM lays them out; bytes of NaN where no sequence has a key.

    Scales are from 2^-10 to 2^-9 in steps that float32 holds, so that scores are of the order of 10.
    """
    pages, page_size, _, width = drawing.shape(name)
    d, used, generator = width - SCALE_BYTES, _used_keys(drawing, name), drawing.generator(name)
    page, place, different = used // page_size, used % page_size, len(used)
    if TIES in drawing.workload.uuid:
        different = min(different, TIED_KEYS)
    keys = _fp8(different * d, generator, KEY_SCALE).view(-1, d)
    steps = torch.randint(256, (different,), generator=generator)
    scale = ((steps + 256) / 2**18).float().view(torch.uint8).view(-1, SCALE_BYTES)
    cache = torch.tensor(NAN_BYTES, dtype=torch.uint8)[torch.arange(pages * page_size * width) % 2]
    cache = cache.view(pages, page_size * width)
    cache[:, page_size * d :] = NAN_BYTES[1]
    kind = torch.arange(len(used)) % max(1, different)
    cache[:, : page_size * d].unflatten(1, (page_size, d))[page, place] = keys[kind]
    cache[:, page_size * d :].unflatten(1, (page_size, SCALE_BYTES))[page, place] = scale[kind]
    return drawing.place(name, cache.view(torch.int8).view(drawing.shape(name)))


def _fp8(count: int, generator: torch.Generator, scale: float) -> torch.Tensor:
    """The bytes of `count` normal numbers: a table of codes, drawn from."""
    codes = (normal.quantiles() * scale).to(torch.float8_e4m3fn).view(torch.uint8)
    return codes[normal.draws(count, generator)]


def _used_keys(drawing: Drawing, name: str) -> torch.Tensor:
    """Slots (page * page_size + place) in which some sequence has a key, ascending."""
    page_size, table = drawing.axis(name, "page_size"), drawing.known("block_table", name).long()
    position = torch.arange(table.shape[1] * page_size)
    held = position < drawing.known("seq_lens", name)[:, None]
    slots = table[:, position // page_size] * page_size + position % page_size
    return slots[held].unique()

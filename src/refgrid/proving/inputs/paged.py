"""Structured inputs of paged and ragged attention: row starts, page tables, partial last pages, caches with NaN."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from refgrid.proving.inputs import normal
from refgrid.proving.inputs.normal import movable

if TYPE_CHECKING:
    from refgrid.proving.inputs.drawing import Drawing, Value


def qo_indptr(drawing: Drawing, name: str) -> Value:
    """Queries of each sequence, zeros among them."""
    total = drawing.shape("q")[0] if "q" in drawing.definition.inputs else drawing.axis(name, "total_q")
    return drawing.place(name, _indptr(composition(total, drawing.shape(name)[0] - 1, drawing.generator(name))))


def kv_indptr(drawing: Drawing, name: str) -> Value:
    """Pages of each sequence, tokens where there are no pages; where the sizes allow it, enough for its queries."""
    paged, count = "num_kv_indices" in drawing.axes, drawing.shape(name)[0] - 1
    total = drawing.axis(name, "num_kv_indices" if paged else "total_kv")
    least = torch.zeros(max(count, 0), dtype=torch.int64)
    if "qo_indptr" in drawing.cpu:
        page_size = drawing.axis(name, "page_size") if paged else 1
        wanted = -(-drawing.cpu["qo_indptr"].diff().long() // page_size)
        least = wanted if int(wanted.sum()) <= total else least
    parts = least + composition(total - int(least.sum()), count, drawing.generator(name))
    return drawing.place(name, _indptr(parts))


def kv_indices(drawing: Drawing, name: str) -> Value:
    """Pages in an order of their own; shared between sequences only when there are fewer pages than indices."""
    wanted, pages, generator = drawing.shape(name)[0], drawing.axis(name, "num_pages"), drawing.generator(name)
    if wanted and not pages:
        raise drawing.error(name, f"has {wanted} entries, but num_pages is 0: there is no page to name")
    if wanted <= pages:
        order = torch.randperm(pages, generator=generator)[:wanted]
    else:
        order = torch.randint(pages, (wanted,), generator=generator)
    return drawing.place(name, order.to(torch.int32))


def kv_last_page_len(drawing: Drawing, name: str) -> Value:
    """1 to page_size tokens, as many as the queries need if all fit, and 0 for a sequence without pages.

    0 because FlashInfer's get_seq_lens adds it to (pages - 1, at least 0) * page_size.
    """
    page_size, pages = drawing.axis(name, "page_size"), drawing.known("kv_indptr", name).diff().long()
    least = torch.ones_like(pages)
    if "qo_indptr" in drawing.cpu:
        needed = drawing.cpu["qo_indptr"].diff() - (pages - 1) * page_size
        least = needed.clamp(min=1) if bool((needed <= page_size).all()) else least
    choices = page_size + 1 - least  # differ, so a remainder: of so large a number it is as good as uniform
    lengths = least + torch.randint(2**40, (len(pages),), generator=drawing.generator(name)) % choices
    return drawing.place(name, (lengths * (pages > 0)).to(torch.int32))


def paged_cache(drawing: Drawing, name: str) -> Value:
    """Numbers in the slots that a sequence uses and NaN in all others, so that reading a wrong slot shows."""
    return filled_cache(drawing, name, used_slots(drawing, name))


def filled_cache(drawing: Drawing, name: str, slots: torch.Tensor) -> Value:
    """Numbers in `slots` (page * page_size + place, ascending) and NaN in all others.

    Made on the device, a block of slots at a time: a cache can be larger than the machine's memory.
    """
    shape, slots, start = drawing.shape(name), slots.to(drawing.device), 0
    cache = torch.full(shape, torch.nan, dtype=drawing.float_dtype(name), device=drawing.device)
    rows, width = movable(cache).view(-1, *shape[2:]), max(1, math.prod(shape[2:]))
    drawing.hash_head(name, shape)
    for part in drawing.numbers(name, len(slots) * width, block=max(4, normal.BLOCK // width // 4 * 4) * width):
        drawing.feed(part)
        block = movable(part).view(-1, *shape[2:]).to(drawing.device)
        rows.index_copy_(0, slots[start : start + len(block)], block)
        start += len(block)
    return cache


def used_slots(drawing: Drawing, name: str) -> torch.Tensor:
    """Slots (page * page_size + place) that some sequence uses, ascending."""
    page_size, count = drawing.axis(name, "page_size"), drawing.axis(name, "num_pages")
    pages, indptr = drawing.known("kv_indices", name).long(), drawing.known("kv_indptr", name).long()
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < count:
        raise drawing.error("kv_indices", f"names a page outside [0, {count})")
    filled = torch.full_like(pages, page_size)
    if "kv_last_page_len" in drawing.cpu:
        lengths = drawing.cpu["kv_last_page_len"].long()
        filled[indptr[1:][lengths > 0] - 1] = lengths[lengths > 0]
    used = torch.zeros(count, dtype=torch.int64)
    used.scatter_reduce_(0, pages, filled, "amax")  # a shared page holds what any of its sequences needs
    return (torch.arange(page_size) < used[:, None]).reshape(-1).nonzero().squeeze(1)


def composition(total: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` whole numbers of sum `total`, each such row of cuts equally likely; zeros are among them."""
    if count <= 0:
        return torch.zeros(0, dtype=torch.int64)
    cuts = torch.randint(total + 1, (count - 1,), generator=generator).sort().values
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), cuts, torch.tensor([total])])
    return ends.diff()


def _indptr(parts: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.int64), parts.cumsum(0)]).to(torch.int32)

"""What a rank does for one layout of sequences: planned once, kept for the layers and steps that come with it again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan, plan_grouped_attn
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL
from refgrid_solutions.grouped_attention.zigzag.layout import EARLY, LATE, Layout, Ranges

# Each holds 16 bytes a key on the device, and the metadata of its backend.
MOST_PLANS = 64


class Setting(NamedTuple):
    """What besides the layout a plan depends on; the heads are those of one step."""

    num_heads_q: int
    num_heads_k: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    causal: bool
    grouped: bool
    deterministic: bool
    backend: str


class Call(NamedTuple):
    """One call of attention: some rows of the local order, as an index of them, over the keys that this rank sees."""

    rows: slice | torch.Tensor
    plan: GroupedAttnPlan


@dataclass(frozen=True, eq=False)
class ZigzagPlan:
    """The calls of one step, and where keys and their gradients go between the gathered order and the true one, int64.

    seen: which of the gathered keys this rank sees, in true order. places: of each gathered key its place among those,
    any of one that is not seen; unseen: which those are. All None where the gathered order is the true one and all is
    seen: with one rank.

    Why keys are copied into true order, instead of read where the gather put them: in true order the keys of a slice
    are one range, a start and a length, which every varlen kernel takes, and the mask is bottom-right. In gathered
    order they are a range for each chunk: no varlen kernel takes that, and as slices of their own their outputs would
    have to be merged in float32, once a chunk. The copy is one kernel a step for keys and values together, leaves out
    what this rank does not see (a quarter of all, on average), and should take 1 to 2 % of the attention's time at 64K
    tokens and 8 ranks by its bytes, less at more tokens. It also frees the buffer that the next keys are gathered into.
    """

    calls: tuple[Call, ...]
    seen: torch.Tensor | None = None
    places: torch.Tensor | None = None
    unseen: torch.Tensor | None = None


@lru_cache(maxsize=MOST_PLANS)
def zigzag_plan(layout: Layout, setting: Setting) -> ZigzagPlan:
    """Planned at the first call with these values, which copies to the device; later calls look it up.

    One call for both chunks of all sequences; where not grouped, one for the early chunks and one for the late ones.
    The host waits for the copy: who looks it up may be on another stream, and cannot know which one to wait for.
    """
    halves = [(EARLY, LATE)] if setting.grouped else [(EARLY,), (LATE,)]
    found = ZigzagPlan(tuple(_call(layout, setting, each) for each in halves), *_orders(layout, setting))
    if setting.device.type == "cuda":
        torch.cuda.current_stream(setting.device).synchronize()
    return found


def _call(layout: Layout, setting: Setting, halves: Sequence[int]) -> Call:
    """Attention of these chunks of every sequence, their rows back to back."""
    each = (zip(layout.rows(half), layout.keys(half, setting.causal), strict=True) for half in halves)
    pieces = sorted(chain(*each))
    rows = [rows for rows, _ in pieces]
    plan = plan_grouped_attn(
        *(_back_to_back(rows), [keys for _, keys in pieces]),
        [CAUSAL if setting.causal else FULL] * len(pieces),
        total_q=sum(end - start for start, end in rows),
        total_k=layout.seen_offsets(setting.causal)[-1],
        num_heads_q=setting.num_heads_q,
        num_heads_k=setting.num_heads_k,
        head_dim=setting.head_dim,
        dtype=setting.dtype,
        device=setting.device,
        deterministic=setting.deterministic,
        backend=setting.backend,
    )
    return Call(_index(rows, setting.device), plan)


def _orders(layout: Layout, setting: Setting) -> Sequence[torch.Tensor]:
    """seen, places and unseen; nothing with one rank."""
    if layout.world_size == 1:
        return ()
    seen = _numbers(layout.seen_sources(setting.causal))
    places = torch.full((layout.world_size * layout.total_local,), -1)
    places[seen] = torch.arange(len(seen))
    unseen = (places < 0).nonzero().flatten()
    return [each.to(setting.device) for each in (seen, places.clamp(min=0), unseen)]


def _index(rows: Ranges, device: torch.device) -> slice | torch.Tensor:
    """A slice where the rows are all in one run, which takes no copy of them."""
    runs = [(start, end) for start, end in rows if start < end]
    if all(one[1] == other[0] for one, other in pairwise(runs)):
        return slice(runs[0][0], runs[-1][1]) if runs else slice(0, 0)
    return _numbers(rows).to(device)


def _numbers(ranges: Ranges) -> torch.Tensor:
    """All numbers of the ranges, one range after the other, int64."""
    starts, ends = torch.tensor(ranges, dtype=torch.int64).view(-1, 2).T  # of none, too
    lengths = ends - starts
    firsts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - firsts).repeat_interleave(lengths)


def _back_to_back(ranges: Ranges) -> Ranges:
    return list(pairwise(accumulate((end - start for start, end in ranges), initial=0)))

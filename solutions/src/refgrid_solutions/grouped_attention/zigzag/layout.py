"""The zigzag layout, in integers: which chunks of each sequence a rank holds, and where they lie once gathered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from refgrid_solutions.grouped_attention.ranges import check_size, listed

Ranges = list[tuple[int, int]]

# The two chunks that a rank holds of every sequence, in the order in which it holds them.
EARLY, LATE = 0, 1


@dataclass(frozen=True)
class Layout:
    """Each sequence in 2 * world_size chunks of one length; this rank holds the rank-th, and the rank-th from the end.

    There are three orders of tokens. True: sequence after sequence. Local: of every sequence this rank's early chunk,
    then its late one. Gathered: the local tokens of rank 0, then those of rank 1, and so on. chunk_lengths: tokens of
    one chunk, an entry a sequence.
    """

    chunk_lengths: tuple[int, ...]
    rank: int
    world_size: int

    @property
    def own(self) -> tuple[int, int]:
        """The numbers of this rank's early and its late chunk."""
        return self.rank, 2 * self.world_size - 1 - self.rank

    @cached_property
    def local_offsets(self) -> list[int]:
        """Where each sequence begins in local order, and the end."""
        return [0, *accumulate(2 * length for length in self.chunk_lengths)]

    @property
    def total_local(self) -> int:
        """Tokens of one rank."""
        return self.local_offsets[-1]

    def true_chunks(self) -> Iterator[tuple[int, int]]:
        """Where the local tokens are in true order, chunk after chunk."""
        for offset, length in zip(self.local_offsets, self.chunk_lengths, strict=False):
            for chunk in self.own:
                start = offset * self.world_size + chunk * length
                yield start, start + length

    def seen_chunks(self, causal: bool) -> int:
        """How many chunks of a sequence, from its first on, any row of this rank sees."""
        return self.own[LATE] + 1 if causal else 2 * self.world_size

    def seen_offsets(self, causal: bool) -> list[int]:
        """Where each sequence begins among the keys that this rank sees, in true order, and the end."""
        return [0, *accumulate(self.seen_chunks(causal) * length for length in self.chunk_lengths)]

    def seen_places(self, causal: bool) -> Iterator[tuple[int, int, int]]:
        """Those keys, chunk after chunk: the rank that holds it, where it begins there, and its length."""
        for offset, length in zip(self.local_offsets, self.chunk_lengths, strict=False):
            for chunk in range(self.seen_chunks(causal)):
                late = chunk >= self.world_size
                yield 2 * self.world_size - 1 - chunk if late else chunk, offset + late * length, length

    def seen_sources(self, causal: bool) -> Ranges:
        """Where those keys are in gathered order, chunk after chunk."""
        places = ((rank * self.total_local + start, length) for rank, start, length in self.seen_places(causal))
        return [(start, start + length) for start, length in places]

    def rows(self, half: int) -> Ranges:
        """Of every sequence, where this rank's chunk (EARLY or LATE) is in local order."""
        starts = (
            offset + half * length for offset, length in zip(self.local_offsets, self.chunk_lengths, strict=False)
        )
        return [(start, start + length) for start, length in zip(starts, self.chunk_lengths, strict=True)]

    def keys(self, half: int, causal: bool) -> Ranges:
        """Of every sequence, the keys that this chunk sees, among those that this rank sees."""
        chunks = self.own[half] + 1 if causal else 2 * self.world_size
        starts = self.seen_offsets(causal)
        return [(start, start + chunks * length) for start, length in zip(starts, self.chunk_lengths, strict=False)]


def layout_of(name: str, cu_seqlens: Any, rank: int, world_size: int) -> Layout:
    """The layout of sequences with these offsets, of all ranks together; ValueError says which entry is not legal."""
    check_size("world_size", world_size, smallest=1)
    check_size("rank", rank, smallest=0)
    if rank >= world_size:
        raise ValueError(f"rank = {rank}, but should be less than world_size = {world_size}")
    offsets = offsets_from(name, cu_seqlens)
    for index, (start, end) in enumerate(pairwise(offsets)):
        _check_divides(name, index, end - start, world_size)
    lengths = tuple((end - start) // (2 * world_size) for start, end in pairwise(offsets))
    return Layout(lengths, rank, world_size)


def offsets_from(name: str, told: Any) -> tuple[int, ...]:
    """Offsets of sequences as integers. A tensor on a GPU is copied to the host, which waits for the GPU."""
    offsets = tuple(listed(name, told))
    for index, offset in enumerate(offsets):
        check_size(f"{name}[{index}]", offset, smallest=0)
    if not offsets or offsets[0]:
        raise ValueError(f"{name} = {list(offsets)}, but should begin with 0, and hold the end of every sequence")
    for index, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise ValueError(f"{name}[{index + 1}] = {end}, but should be at least {name}[{index}] = {start}")
    return offsets


def check_local(cu_seqlens_q: Any, layout: Layout) -> None:
    """ValueError unless these are the offsets of one rank's part of the sequences."""
    told, should = offsets_from("cu_seqlens_q", cu_seqlens_q), layout.local_offsets
    if len(told) != len(should):
        raise ValueError(
            f"cu_seqlens_q tells of {len(told) - 1} sequences, but should of {len(should) - 1}, as cu_seqlens_k does"
        )
    for index, (one, other) in enumerate(zip(told, should, strict=True)):
        if one != other:
            raise ValueError(
                f"cu_seqlens_q[{index}] = {one}, but should be {other}: cu_seqlens_k[{index}] = "
                f"{other * layout.world_size}, of all ranks together, divided by world_size = {layout.world_size}"
            )


def check_longest(name: str, bound: int, offsets: Sequence[int]) -> None:
    """ValueError unless the bound is at least the longest sequence."""
    check_size(name, bound, smallest=0)
    longest = max((end - start for start, end in pairwise(offsets)), default=0)
    if bound < longest:
        raise ValueError(f"{name} = {bound}, but should be at least {longest}, the longest sequence")


def _check_divides(name: str, index: int, length: int, world_size: int) -> None:
    parts = 2 * world_size
    if length % parts:
        below = length // parts * parts
        raise ValueError(
            f"{name}[{index + 1}] - {name}[{index}] = {length}, but should be a multiple of 2 * world_size = {parts}, "
            f"such as {below} or {below + parts}: each sequence is cut into so many equal chunks"
        )

"""What slices of grouped attention say, for adapters whose library knows one range of keys and one mask a call."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from refgrid_groundtruth.paged import TILE_ROWS, Tile

if TYPE_CHECKING:
    from collections.abc import Iterator

CAUSAL = 1  # of the mask types; 0 is full

Slice = tuple[int, int, int, int, bool]  # queries from and to, keys from and to, causal


def slices(q_ranges: torch.Tensor, k_ranges: torch.Tensor, mask_types: torch.Tensor) -> list[Slice]:
    """All slices as numbers, in the order in which they are given."""
    rows = zip(q_ranges.tolist(), k_ranges.tolist(), mask_types.tolist(), strict=True)
    return [(start, end, first, last, mask == CAUSAL) for (start, end), (first, last), mask in rows]


def blind_rows(piece: Slice) -> int:
    """How many queries of a slice, its first ones, see no key."""
    start, end, first, last, causal = piece
    return max(0, end - start - (last - first)) if causal or first == last else 0


def sees_no_key(pieces: list[Slice], device: torch.device) -> torch.Tensor:
    """Which queries of the slices, one slice after another, see no key; bool."""
    found = [torch.arange(piece[1] - piece[0]) < blind_rows(piece) for piece in pieces]
    return torch.cat([torch.zeros(0, dtype=torch.bool), *found]).to(device)


def tiles(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pieces: list[Slice]) -> Iterator[Tile]:
    """All queries of all slices, some of one slice at a time, with the keys that the last of them sees."""
    for number, (start, end, first, last, causal) in enumerate(pieces):
        for row in range(start, end, TILE_ROWS):
            rows = slice(row, min(row + TILE_ROWS, end))
            seen = max(last - first - (end - rows.stop), 0) if causal else last - first
            keys, mask = slice(first, first + seen), q.new_zeros(rows.stop - row, seen)
            if causal:
                mask = torch.full_like(mask, float("-inf")).triu(seen - len(mask) + 1)
            yield Tile(number, rows, q[rows], k[keys], v[keys], mask)

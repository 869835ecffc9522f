"""What slices of grouped attention say, for adapters whose library knows one range of keys and one mask a call."""

from __future__ import annotations

import torch

from refgrid_groundtruth.paged import Piece

CAUSAL = 1  # of the mask types; 0 is full


def slices(q_ranges: torch.Tensor, k_ranges: torch.Tensor, mask_types: torch.Tensor) -> list[Piece]:
    """All slices as numbers, in the order in which they are given."""
    rows = zip(q_ranges.tolist(), k_ranges.tolist(), mask_types.tolist(), strict=True)
    return [Piece(start, end, first, last, mask == CAUSAL) for (start, end), (first, last), mask in rows]


def blind_rows(piece: Piece) -> int:
    """How many queries of a slice, its first ones, see no key."""
    start, end, first, last, causal = piece
    return max(0, end - start - (last - first)) if causal or first == last else 0


def sees_no_key(pieces: list[Piece], device: torch.device) -> torch.Tensor:
    """Which queries of the slices, one slice after another, see no key; bool."""
    found = [torch.arange(piece[1] - piece[0]) < blind_rows(piece) for piece in pieces]
    return torch.cat([torch.zeros(0, dtype=torch.bool), *found]).to(device)

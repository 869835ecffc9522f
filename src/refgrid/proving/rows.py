"""How far off a row is as a vector, relative to its own norm.

A sum of K products is off by some sqrt(K) roundings of its terms, whatever is left of the sum: where terms cancel, the
error relative to the element says nothing, and an absolute bound that lets it pass lets a factor of 1.01 pass too. The
norm of the row has the size of the terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from refgrid.proving.measure import pieces, threads_for

SHORTEST = 16  # numbers; the norm of fewer may cancel as a single one does
# A row shorter than this share of the typical one counts as that long: what is left after cancelling has no scale.
FLOOR = 1e-3
# Elements at once: on a CPU as in `measure`, so that buffers stay in a cache and PyTorch shares nothing among threads.
_BLOCK = {"cpu": 7 * 2**12}
_LARGE_BLOCK = 2**24
_Block: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # columns of the sums, then actual and expected


@dataclass(frozen=True)
class RowError:
    """The row that is furthest off relative to its norm: its index, the error, and the bound for it."""

    row: tuple[int, ...]
    error: float
    bound: float

    @property
    def within(self) -> bool:
        """Whether the bound holds; a nan is no number, so it is not within."""
        return self.error <= self.bound

    @property
    def headroom(self) -> float:
        """Error over bound."""
        return self.error / self.bound if self.error else 0.0

    def describe(self) -> str:
        """Thing, place, value and what it should be."""
        told = f"{self.error:.3g} of its norm but should be at most {self.bound:g}"
        return f"row {list(self.row)} as a whole is off by {told}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any] | None) -> RowError | None:
        """The inverse of `dataclasses.asdict`."""
        return cls(tuple(data["row"]), float(data["error"]), float(data["bound"])) if data else None


def furthest_row(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> RowError | None:
    """The row of the largest relative error, or None where rows are too short to have a norm that means something.

    A row is what the last dimension holds. Elements that are not finite on both sides are left out: they are judged
    one by one.
    """
    if expected.ndim == 0 or expected.shape[-1] < SHORTEST or expected.numel() == 0:
        return None
    off, size = _sums(actual, expected).sqrt_()  # where rows are short, half as large as a tensor: changed in place
    right = off == 0  # nothing over nothing is no error
    scale = size.clamp_(min=FLOOR * float(size.square().mean().sqrt()))
    share = off.div_(scale).masked_fill_(right, 0.0)
    worst = int(share.argmax())
    return RowError(index_of(worst, expected.shape[:-1]), float(share[worst]), bound)


def index_of(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Where the element of this number is. So says torch.unravel_index, but imports SymPy first: a second a worker."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return tuple(reversed(index))


def _sums(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row the sums of squares of what is off and of what is expected, [2, rows] float64."""
    length, most = expected.shape[-1], _BLOCK.get(expected.device.type, _LARGE_BLOCK)
    parts = -(-length // most)  # of a row, each with a column of its own: threads add to none together
    sums = torch.zeros(2, expected.numel() // length, parts, dtype=torch.float64, device=expected.device)
    columns = sums.view(2, -1)
    for a, e, start in pieces(actual, expected):
        blocks = []
        for at, size in _cuts(start, len(a), length, most):
            first, rows = at // length * parts + at % length // most, max(1, size // length)
            pair = (side[at - start : at - start + size].view(rows, -1) for side in (a, e))
            blocks.append((columns[:, first : first + rows], *pair))
        _add(blocks, min(len(blocks), threads_for(len(a))))
    return sums[..., 0] if parts == 1 else sums.sum(2)


def _cuts(start: int, count: int, length: int, most: int) -> Iterator[tuple[int, int]]:
    """Place and size of blocks of whole rows, or of a part of one, of at most `most` elements."""
    at, end = start, start + count
    while at < end:
        left = length - at % length  # of the row that it is in
        whole = min(most, end - at) // length * length if left == length else 0
        size = whole or min(most, left, end - at)
        yield at, size
        at += size


def _add(blocks: Sequence[_Block], threads: int) -> None:
    """Add each block's sums to its columns."""
    if blocks[0][0].device.type != "cpu":
        for columns, a, e in blocks:
            columns.add_(_careful(a, e))
    elif threads == 1:
        _add_here(blocks)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(_add_here, (blocks[first::threads] for first in range(threads))))


def _add_here(blocks: Sequence[_Block]) -> None:
    """In this thread, in buffers that it keeps."""
    largest = max(a.numel() for _, a, _ in blocks)
    with torch.no_grad():  # holds for a thread, not for those that it starts
        buffers = torch.empty(3, largest, dtype=_wide(blocks[0][1]))
        for columns, a, e in blocks:
            columns.add_(_usual(a, e, buffers))


def _usual(actual: torch.Tensor, expected: torch.Tensor, buffers: torch.Tensor) -> torch.Tensor:
    """As _careful, and the same bits: what is not finite is looked for only where a sum is not."""
    a, e, off = buffers[:, : actual.numel()].view(3, *actual.shape)
    torch.sub(a.copy_(actual), e.copy_(expected), out=off)
    squares = [each.mul_(each) for each in (off, e)]
    sums = _by_row(squares)
    if math.isfinite(sums.sum().item()):
        return sums
    for side in (actual, expected):
        nothing = a.copy_(side).mul_(0.0)  # nan where it is not finite; a mask would take five times as long
        for each in squares:
            each.add_(nothing)
    return _by_row([each.nan_to_num_(0.0, posinf=math.inf) for each in squares])


def _by_row(squares: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([each.sum(dim=1, dtype=torch.float64) for each in squares])


def _careful(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The sums of each row of a block, [2, rows]; stays on the device and waits for nothing."""
    a, e = actual.to(_wide(actual)), expected.to(_wide(expected))
    finite = torch.isfinite(a) & torch.isfinite(e)
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    return _by_row([each.square_() for each in (a - e, e)])


def _wide(values: torch.Tensor) -> torch.dtype:
    """What squares are taken in."""
    return torch.float64 if values.dtype in (torch.float32, torch.float64) else torch.float32

"""How far off a row is as a vector, relative to its own norm.

A sum of K products is off by some sqrt(K) roundings of its terms, whatever is left of the sum: where terms cancel, the
error relative to the element says nothing, and an absolute bound that lets it pass lets a factor of 1.01 pass too. The
norm of the row has the size of the terms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHORTEST = 16  # numbers; the norm of fewer may cancel as a single one does
# A row shorter than this share of the typical one counts as that long: what is left after cancelling has no scale.
FLOOR = 1e-3
_BLOCK = {"cpu": 2**16}  # elements at once: temporaries stay in a CPU's cache
_LARGE_BLOCK = 2**24


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
    a, e = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (actual, expected))
    parts = [torch.stack(_squares(*block)) for block in _blocks(a, e)]
    off, size = torch.cat(parts, dim=1).sqrt().unbind()
    scale = size.clamp(min=FLOOR * float(size.square().mean().sqrt()))
    share = torch.where(off > 0, off / scale, 0.0)  # nothing over nothing is no error
    worst = int(share.argmax())
    return RowError(index_of(worst, expected.shape[:-1]), float(share[worst]), bound)


def index_of(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Where the element of this number is. So says torch.unravel_index, but imports SymPy first: a second a worker."""
    index = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        index.append(at)
    return tuple(reversed(index))


def _squares(actual: torch.Tensor, expected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row the sum of squares of what is off and of what is expected, float64."""
    wide = torch.float64 if expected.dtype in (torch.float32, torch.float64) else torch.float32
    a, e = actual.to(wide), expected.to(wide)
    finite = torch.isfinite(a) & torch.isfinite(e)
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    return (a - e).square_().sum(dim=1, dtype=torch.float64), e.square_().sum(dim=1, dtype=torch.float64)


def _blocks(actual: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rows = max(1, _BLOCK.get(expected.device.type, _LARGE_BLOCK) // expected.shape[1])
    return zip(actual.split(rows), expected.split(rows), strict=True)

"""The measures of two tensors, taken a chunk at a time in float64, so that no temporary is as large as they are.

On a CPU the limits are passes over memory and calls of PyTorch, so a chunk of usual values, finite or the same on both
sides, is measured in buffers that its thread keeps, and is ranked only if it may hold one of the worst. Threads of our
own take a range of chunks each. PyTorch's would have to meet after every call, and a call on a chunk takes
microseconds: where cores are shared they wait a hundred times longer for each other than they compute.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from refgrid.proving.tolerance import Tolerance

WORST = 5
# Elements of a chunk: on a CPU its five buffers in float64 stay near a core's caches, and no call is so large (2**15)
# that PyTorch would share it among threads.
_CHUNK = {"cpu": 7 * 2**12}
_LARGE_CHUNK = 2**22
_PIECE = 2**20  # elements that are copied at once where they do not lie one after another; least for a thread
_MOST_THREADS = 8  # more of them would wait for Python's lock

# The columns of one chunk's row: sums, maxima, then a rank, an error and a place for each of its worst elements.
_SUMS = ("matched", "nonfinite", "finite", "abs", "rel", "nonzero", "squares", "aa", "ee", "ae")
_MAXIMA = ("abs", "rel", "headroom", "beyond")
_WIDTH = len(_SUMS) + len(_MAXIMA)
_UNRANKED = torch.tensor([[-math.inf, 0.0, 0.0]] * WORST, dtype=torch.float64).flatten()
_LEAST_RANK = torch.finfo(torch.float64).min  # of an element without any error


@dataclass(frozen=True)
class Measured:
    """Sums and maxima over all elements, by name, and the worst elements as (place, error), worst first.

    `abs`, `rel` and `squares` are of errors, `aa`, `ee` and `ae` products of the values, over elements that are finite
    on both sides; `finite`, `nonzero` (of the expected), `matched` and `nonfinite` (disagreements) count elements.
    `beyond` is the largest error less what rtol allows and less atol: below 0 by what of atol was not needed.
    """

    total: dict[str, float]
    largest: dict[str, float]
    worst: tuple[tuple[int, float], ...]


def measure(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> Measured:
    """Measure two tensors of one shape, dtype and device with at least one element; places count in their order."""
    rows = torch.cat([_rows(*piece, tolerance) for piece in pieces(actual, expected)])
    total = dict(zip(_SUMS, rows[:, : len(_SUMS)].sum(0).tolist(), strict=True))
    largest = dict(zip(_MAXIMA, rows[:, len(_SUMS) : _WIDTH].amax(0).tolist(), strict=True))
    ranked = rows[:, _WIDTH:].reshape(-1, 3)
    ranked = ranked[ranked[:, 0] > -math.inf].tolist()
    worst = sorted((-rank, int(place), error) for rank, error, place in ranked)[:WORST]
    return Measured(total, largest, tuple((place, error) for _, place, error in worst))


def pieces(
    actual: torch.Tensor, expected: torch.Tensor, start: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Both in one dimension, in order, with the place of the first element; only what is not contiguous is copied."""
    if actual.numel() <= _PIECE or (actual.is_contiguous() and expected.is_contiguous()):
        yield actual.reshape(-1), expected.reshape(-1), start
        return
    each = actual.numel() // len(actual)
    count = max(1, _PIECE // each)
    for first in range(0, len(actual), count):
        part = first if count == 1 else slice(first, first + count)
        yield from pieces(actual[part], expected[part], start + first * each)


def threads_for(count: int) -> int:
    """How many share so many elements on a CPU."""
    return int(min(torch.get_num_threads(), _MOST_THREADS, max(1, count // _PIECE)))


def _rows(actual: torch.Tensor, expected: torch.Tensor, start: int, tolerance: Tolerance) -> torch.Tensor:
    """The rows of all chunks of a piece, [chunks, columns] float64 on the CPU."""
    size, count = _CHUNK.get(actual.device.type, _LARGE_CHUNK), actual.numel()
    if actual.device.type != "cpu" or not actual.is_floating_point():
        places = range(0, count, size)
        chunks = ((actual[at : at + size], expected[at : at + size], start + at) for at in places)
        return torch.stack([_careful(*chunk, tolerance) for chunk in chunks]).cpu()
    threads = threads_for(count)
    share = -(-count // threads)
    parts = [(actual[at : at + share], expected[at : at + share], start + at) for at in range(0, count, share)]
    if threads == 1:
        return _Bench(min(size, count), tolerance).rows(*parts[0])
    with ThreadPoolExecutor(threads) as pool:
        return torch.cat(list(pool.map(lambda part: _Bench(size, tolerance).rows(*part), parts)))


class _Bench:
    """One thread's buffers, and the rank that an element must exceed to be among the worst of its range."""

    def __init__(self, size: int, tolerance: Tolerance) -> None:
        self._buffers = torch.empty(5, size, dtype=torch.float64)
        self._size, self._tolerance = size, tolerance
        self._ranks = [-math.inf] * WORST

    def rows(self, actual: torch.Tensor, expected: torch.Tensor, start: int) -> torch.Tensor:
        """The rows of one range."""
        places = range(0, len(actual), self._size)
        # In one tensor: kept one by one, they lie in what temporaries leave, and the heap grows by each chunk.
        rows = torch.empty(len(places), _WIDTH + 3 * WORST, dtype=torch.float64)
        with torch.no_grad():  # holds for a thread, not for those that it starts
            for row, at in zip(rows, places, strict=True):
                row.copy_(self._row(actual[at : at + self._size], expected[at : at + self._size], start + at))
        return rows

    def _row(self, actual: torch.Tensor, expected: torch.Tensor, start: int) -> torch.Tensor:
        row = self._usual(actual, expected, start)
        if row is None:
            row = _careful(actual, expected, start, self._tolerance)
        self._ranks = sorted(self._ranks + row[_WIDTH::3].tolist())[-WORST:]
        return row

    def _usual(self, actual: torch.Tensor, expected: torch.Tensor, start: int) -> torch.Tensor | None:
        """As _careful, unless values that are not finite disagree or a difference leaves the range of float64."""
        a, e, error, allowed, work = self._buffers[:, : len(actual)]
        largest = torch.sub(a.copy_(actual), e.copy_(expected), out=error).abs_().amax().item()
        agreed = 0.0
        if math.isnan(largest):
            agreed, largest = _zero_agreed(a, e, error), error.amax().item()
        if not math.isfinite(largest):
            return None
        count, ee = float(len(actual)), _squares(e)
        finite = count - agreed
        if largest == 0:
            least = e.abs_().amin().item()
            nonzero, beyond = float(torch.count_nonzero(e)), -(self._tolerance.rtol * least + self._tolerance.atol)
            row = [count, 0.0, finite, 0.0, 0.0, nonzero, 0.0, ee, ee, ee, 0.0, 0.0, 0.0, beyond]
            return self._with_ranks(row, error, None, start, largest)
        aa, ae = _squares(a), torch.mul(a, e, out=work).sum().item()
        size = e.abs_()
        torch.mul(size, self._tolerance.rtol, out=allowed).add_(self._tolerance.atol)
        headroom = torch.div(error, allowed, out=work).amax().item()
        if math.isnan(headroom):  # 0 / 0 is no error at all
            headroom = work.masked_fill_(error == 0, 0.0).amax().item()
        beyond = torch.sub(error, allowed, out=work).amax().item()
        ok = error <= allowed if headroom > 1 else None
        matched = count if ok is None else float(torch.count_nonzero(ok))
        relative, nonzero = torch.div(error, size, out=work), count
        if not math.isfinite(rel := relative.sum().item()):
            zero = size == 0
            rel, nonzero = relative.masked_fill_(zero, 0.0).sum().item(), count - float(torch.count_nonzero(zero))
        sums = [matched, 0.0, finite, error.sum().item(), rel, nonzero, _squares(error), aa, ee, ae]
        return self._with_ranks([*sums, largest, relative.amax().item(), headroom, beyond], error, ok, start, largest)

    def _with_ranks(
        self, row: list[float], error: torch.Tensor, ok: torch.Tensor | None, start: int, largest: float
    ) -> torch.Tensor:
        """The row, and the worst of the chunk where they may be among the worst of all; among equals the first are."""
        best = largest if ok is not None else max(-1 / largest, _LEAST_RANK) if largest else _LEAST_RANK
        if best <= self._ranks[0]:
            ranks = _UNRANKED
        else:
            ranks = _rank(error, torch.ones_like(error, dtype=torch.bool) if ok is None else ok, start)
        return torch.cat([torch.tensor(row, dtype=torch.float64), ranks])


def _zero_agreed(a: torch.Tensor, e: torch.Tensor, error: torch.Tensor) -> float:
    """Set to 0 what is not finite, as _careful does, and tell how much that is; what disagrees keeps its error.

    The difference of equal infinities is nan, and so is that of a nan from anything.
    """
    count = float(torch.count_nonzero(error.isnan()))
    if torch.equal(a.isnan(), e.isnan()):
        for each in (a, e):
            each.nan_to_num_(0.0, posinf=0.0, neginf=0.0)  # to fill by a mask takes four times as long
        error.nan_to_num_(0.0, posinf=math.inf)
    return count


def _squares(values: torch.Tensor) -> float:
    """The sum of squares; `dot` would share the work among threads that take longer to meet than to multiply."""
    norm = float(torch.linalg.vector_norm(values))
    return norm * norm  # which may be infinite, where ** would raise


def _careful(actual: torch.Tensor, expected: torch.Tensor, start: int, tolerance: Tolerance) -> torch.Tensor:
    """One chunk's row; stays on the device and waits for nothing. `start` is the place of the chunk's first element."""
    error, finite, same, a, e = _differences(actual, expected)
    size = e.abs()
    allowed = tolerance.rtol * size + tolerance.atol
    ok = torch.where(finite, error <= allowed, same)
    headroom = error / allowed
    if tolerance.atol == 0:  # 0 / 0 is no error at all; an error where none is allowed leaves no headroom
        headroom = torch.where(error > 0, headroom, 0.0)
    nonzero = size > 0
    relative = torch.where(nonzero, error / size, 0.0)
    counts = [value.sum() for value in (ok, ~(finite | same), finite)]
    products = [(one * other).sum() for one, other in ((error, error), (a, a), (e, e), (a, e))]
    sums = [error.sum(), relative.sum(), nonzero.sum(), *products]
    maxima = [error.amax(), relative.amax(), headroom.amax(), (error - allowed).amax()]
    row = [value.double() for value in (*counts, *sums, *maxima)]
    return torch.cat([torch.stack(row), _rank(torch.where(finite | same, error, torch.inf), ok, start)])


def _differences(
    actual: torch.Tensor, expected: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Error, whether both are finite, whether those that are not agree, and both values in float64, 0 if not finite."""
    a, e = actual.double(), expected.double()
    if not actual.is_floating_point():  # float64 does not hold every int64
        actual, expected = actual.long(), expected.long()
        gap = torch.maximum(actual, expected) - torch.minimum(actual, expected)
        error = torch.where(gap < 0, gap.double() + 2.0**64, gap.double())  # beyond 2**63 the difference wraps around
        return error, torch.ones_like(gap, dtype=torch.bool), gap == 0, a, e
    finite = (a - a) == (e - e)  # 0 if finite, else nan, which equals nothing
    same = (a == e) | (a.isnan() & e.isnan())
    a, e = torch.where(finite, a, 0.0), torch.where(finite, e, 0.0)
    return (a - e).abs(), finite, same, a, e


def _rank(error: torch.Tensor, ok: torch.Tensor, start: int) -> torch.Tensor:
    """Rank, error and place of the worst elements of a chunk, the first place among equals; rank -inf is no element.

    An error outside the tolerance ranks above 0, by its size, and one within below 0, by size too.
    """
    rank = torch.where(ok, (-1.0 / error).clamp_min(_LEAST_RANK), error)
    ranks, found = [], []
    for _ in range(WORST):  # max gives the first of equals; which ones topk gives is not said
        worst, place = rank.max(0, keepdim=True)
        rank.index_fill_(0, place, -torch.inf)
        ranks.append(worst)
        found.append(place)
    places = torch.cat(found)
    return torch.stack([torch.cat(ranks), error[places], places.double() + start], 1).flatten()

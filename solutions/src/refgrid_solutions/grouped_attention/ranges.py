"""What a grouped attention is made of: slices of rows and keys, with a mask each. Integers only; checked here."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

FULL = 0
CAUSAL = 1
MASKS = {FULL: "FULL", CAUSAL: "CAUSAL"}

# Row numbers travel to the devices as int32.
LARGEST_TOTAL = 2**31 - 1

# The fields of a Slice; a plain tuple where many are handled, as to make one of those is several steps of Python.
Numbers = tuple[int, int, int, int, int]
# Of all slices the first field, then of all the second, and so on.
Columns = Sequence[Sequence[int]]


class Slice(NamedTuple):
    """Rows [q_start, q_end) of q see keys [k_start, k_end): all of them, or up to the bottom-right diagonal."""

    q_start: int
    q_end: int
    k_start: int
    k_end: int
    mask_type: int

    @property
    def num_rows(self) -> int:
        """Rows of q in this slice."""
        return self.q_end - self.q_start

    @property
    def num_keys(self) -> int:
        """Keys in this slice, whether a row sees them or not."""
        return self.k_end - self.k_start

    def visible(self, row: int) -> int:
        """How many keys, from the first on, the slice's row (counted from 0) sees."""
        if self.mask_type == FULL:
            return self.num_keys
        return min(max(row + 1 + self.num_keys - self.num_rows, 0), self.num_keys)

    @property
    def blind_rows(self) -> int:
        """How many rows, from the first on, see no key."""
        if self.mask_type == FULL and self.num_keys:
            return 0
        return max(self.num_rows - self.num_keys, 0)

    @property
    def visible_pairs(self) -> int:
        """Pairs of a row and a key that it sees."""
        return visible_pairs(*self)


def slices_from(
    q_ranges: Sequence[Sequence[int]],
    k_ranges: Sequence[Sequence[int]],
    mask_types: Sequence[int],
    total_q: int,
    total_k: int,
) -> Columns:
    """The slices in the order given, every one of them legal.

    q_ranges, k_ranges: pairs (start, end), half-open; mask_types: FULL = 0 or CAUSAL = 1. Sequences, or whatever has
    tolist() as tensors do. Rows of q may be in one slice only; keys in any number. ValueError names the first entry
    that is not legal, its value and what would be.
    """
    told = {"q_ranges": q_ranges, "k_ranges": k_ranges, "mask_types": mask_types}
    rows, keys, masks = (listed(name, entries) for name, entries in told.items())
    _check_lengths(rows, keys, masks)
    for name, total in (("total_q", total_q), ("total_k", total_k)):
        check_size(name, total, smallest=0)
    if _are_plain(rows, keys, masks) and _are_legal(columns := _columns(rows, keys, masks), total_q, total_k):
        return columns
    # One after the other takes several times as long: to name the first, or to take what is no pair of plain ints.
    rows = [_pair("q_ranges", index, entry, "total_q", total_q) for index, entry in enumerate(rows)]
    keys = [_pair("k_ranges", index, entry, "total_k", total_k) for index, entry in enumerate(keys)]
    masks = [_mask(index, entry) for index, entry in enumerate(masks)]
    _check_disjoint(rows)
    return _columns(rows, keys, masks)


def visible_pairs(q_start: int, q_end: int, k_start: int, k_end: int, mask_type: int) -> int:
    """Pairs of a row and a key that it sees, in a slice of these numbers."""
    num_rows, num_keys = q_end - q_start, k_end - k_start
    if mask_type == FULL:
        return num_rows * num_keys
    seeing = min(num_rows, num_keys)
    return seeing * (2 * num_keys - seeing + 1) // 2


def check_size(name: str, value: object, *, smallest: int) -> None:
    """ValueError unless value is an integer from smallest to what int32 holds."""
    number = integer_or_none(value)
    if number is None or not smallest <= number <= LARGEST_TOTAL:
        raise ValueError(f"{name} = {value!r}, but should be an integer from {smallest} to {LARGEST_TOTAL}")


def check_heads(num_heads_q: int, num_heads_k: int, head_dim: int) -> None:
    """ValueError unless the heads of k divide those of q."""
    for name, value in (("num_heads_q", num_heads_q), ("num_heads_k", num_heads_k), ("head_dim", head_dim)):
        check_size(name, value, smallest=1)
    if num_heads_q % num_heads_k:
        raise ValueError(
            f"num_heads_k = {num_heads_k} does not divide num_heads_q = {num_heads_q}: "
            "num_heads_q should be a multiple of num_heads_k"
        )


def rows_in_no_slice(slices: Iterable[Numbers], total_q: int) -> Iterator[tuple[int, int]]:
    """The half-open gaps between the slices, in the order of q's rows."""
    end = 0
    for piece in sorted(slices):
        if piece[0] > end:
            yield end, piece[0]
        end = max(end, piece[1])
    if end < total_q:
        yield end, total_q


def listed(name: str, entries: Any) -> list[Any]:
    """The entries of a sequence, or of what has tolist() as tensors do; ValueError if it is neither."""
    values = entries.tolist() if hasattr(entries, "tolist") else entries
    if not isinstance(values, Iterable):
        legal = "a sequence, or a tensor of one dimension or more"
        raise ValueError(f"{name} = {values!r}, but should be {legal}")  # noqa: TRY004 - as of every argument
    return list(values)


def integer_or_none(value: Any) -> int | None:
    """The value as an int; None if it is none, as 2.0 and True are not."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _check_lengths(rows: list[Any], keys: list[Any], masks: list[Any]) -> None:
    if not len(rows) == len(keys) == len(masks):
        raise ValueError(
            f"q_ranges has {len(rows)} entries, k_ranges {len(keys)} and mask_types {len(masks)}: "
            "each slice needs one entry in all three"
        )


def _are_plain(rows: list[Any], keys: list[Any], masks: list[Any]) -> bool:
    """Whether all ranges are tuples or lists of two, and all numbers ints and nothing that only serves as one."""
    entries = [*rows, *keys]
    if not ({*map(type, entries)} <= {tuple, list} and {*map(len, entries)} <= {2}):
        return False
    return {*map(type, chain(*entries, masks))} <= {int}


def _columns(rows: list[Any], keys: list[Any], masks: list[int]) -> Columns:
    return (*zip(*rows, strict=True), *zip(*keys, strict=True), masks) if masks else ((),) * 5


def _are_legal(columns: Columns, total_q: int, total_k: int) -> bool:
    q_starts, q_ends, k_starts, k_ends, masks = columns
    rows = [*chain(*sorted(zip(q_starts, q_ends, strict=True)))]
    return (
        min(chain(q_starts, k_starts), default=0) >= 0
        and max(q_ends, default=0) <= total_q
        and max(k_ends, default=0) <= total_k
        and all(map(operator.le, rows, rows[1:]))  # no range is reversed, and none begins within another
        and all(map(operator.le, k_starts, k_ends))
        and {*masks} <= MASKS.keys()
    )


def _pair(name: str, index: int, entry: Any, total_name: str, total: int) -> tuple[int, int]:
    bounds = [integer_or_none(value) for value in entry] if _has_length(entry) else []
    legal = f"should be (start, end) with 0 <= start <= end <= {total_name} = {total}"
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        raise ValueError(f"{name}[{index}] = {entry!r} is no pair of integers: {legal}")
    start, end = bounds[0], bounds[1]
    wrong = "is negative" if min(start, end) < 0 else "is reversed" if start > end else "is out of bounds"
    if not 0 <= start <= end <= total:
        raise ValueError(f"{name}[{index}] = ({start}, {end}) {wrong}: {legal}")
    return start, end


def _has_length(entry: Any) -> bool:
    """A tensor without dimensions has the method, but no length."""
    return hasattr(entry, "__len__") and getattr(entry, "ndim", 1) > 0


def _mask(index: int, entry: Any) -> int:
    number = integer_or_none(entry)
    if number not in MASKS:
        legal = " or ".join(f"{value} ({name})" for value, name in MASKS.items())
        raise ValueError(f"mask_types[{index}] = {entry!r}, but should be {legal}")
    return number


def _check_disjoint(rows: list[tuple[int, int]]) -> None:
    ordered = sorted((start, end, index) for index, (start, end) in enumerate(rows) if start < end)
    for (start, end, one), (next_start, next_end, other) in pairwise(ordered):
        if next_start < end:
            raise ValueError(
                f"q_ranges[{one}] = ({start}, {end}) and q_ranges[{other}] = ({next_start}, {next_end}) both hold row "
                f"{next_start}: a row of q should be in one slice at most (k_ranges may overlap)"
            )

"""What slices are legal, what the others are told, and how many keys a row sees: held against counting them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from naive_grouped import visible

from refgrid_solutions.grouped_attention.ranges import (
    CAUSAL,
    FULL,
    Slice,
    check_heads,
    check_size,
    rows_in_no_slice,
    slices_from,
)

NUMBERS = st.integers(0, 12)


@st.composite
def slices(draw: st.DrawFn) -> Slice:
    (q_start, q_end), (k_start, k_end) = (sorted((draw(NUMBERS), draw(NUMBERS))) for _ in range(2))
    return Slice(q_start, q_end, k_start, k_end, draw(st.sampled_from([FULL, CAUSAL])))


@given(slices())
def test_what_a_row_sees_is_what_the_definition_counts(piece: Slice) -> None:
    counts = [
        [visible(piece, row, key) for key in range(piece.k_start, piece.k_end)]
        for row in range(piece.q_start, piece.q_end)
    ]

    assert [piece.visible(row) for row in range(piece.num_rows)] == [sum(row) for row in counts]
    assert all(row == sorted(row, reverse=True) for row in counts)  # the visible ones come first
    assert piece.visible_pairs == sum(map(sum, counts))
    assert piece.blind_rows == sum(not any(row) for row in counts)
    assert not any(any(row) for row in counts[: piece.blind_rows])


@given(st.lists(slices(), max_size=4))
def test_the_gaps_are_the_rows_that_no_slice_holds(pieces: list[Slice]) -> None:
    held = {row for piece in pieces for row in range(piece.q_start, piece.q_end)}

    gaps = list(rows_in_no_slice(pieces, 12))

    assert [row for start, end in gaps for row in range(start, end)] == [row for row in range(12) if row not in held]


@given(st.lists(slices(), max_size=4))
def test_rows_may_be_in_one_slice_only(pieces: list[Slice]) -> None:
    rows = [row for piece in pieces for row in range(piece.q_start, piece.q_end)]
    given_ = [piece[:2] for piece in pieces], [piece[2:4] for piece in pieces], [piece.mask_type for piece in pieces]

    if len(rows) == len(set(rows)):
        assert [*zip(*slices_from(*given_, 12, 12), strict=True)] == pieces
    else:
        with pytest.raises(ValueError, match="both hold row"):
            slices_from(*given_, 12, 12)


PAIRS = st.tuples(st.integers(-1, 9), st.integers(-1, 9))


@given(st.lists(st.tuples(PAIRS, PAIRS, st.integers(-1, 2)), max_size=3))
def test_slices_looked_at_together_are_what_they_are_one_after_the_other(entries: list[Any]) -> None:
    rows, keys, masks = ([entry[field] for entry in entries] for field in range(3))
    one_by_one = [[np.int64(start), np.int64(end)] for start, end in rows]  # no plain ints: each is looked at

    assert _told(rows, keys, masks) == _told(one_by_one, keys, masks)


def _told(rows: Any, keys: Any, masks: Any) -> Any:
    """The slices, or what is said of them."""
    try:
        return [*zip(*slices_from(rows, keys, masks, 8, 7), strict=True)]
    except ValueError as error:
        return str(error)


LEGAL_Q = "should be (start, end) with 0 <= start <= end <= total_q = 8"


@pytest.mark.parametrize(
    ("q_ranges", "k_ranges", "mask_types", "words"),
    [
        pytest.param([(0, 9)], [(0, 9)], [0], f"q_ranges[0] = (0, 9) is out of bounds: {LEGAL_Q}", id="q bounds"),
        pytest.param(
            [(0, 4), (4, 8)],
            [(0, 9), (0, 10)],
            [0, 0],
            "k_ranges[1] = (0, 10) is out of bounds: should be (start, end) with 0 <= start <= end <= total_k = 9",
            id="k bounds",
        ),
        pytest.param([(-1, 4)], [(0, 9)], [0], f"q_ranges[0] = (-1, 4) is negative: {LEGAL_Q}", id="negative"),
        pytest.param([(5, 3)], [(0, 9)], [0], f"q_ranges[0] = (5, 3) is reversed: {LEGAL_Q}", id="reversed"),
        pytest.param([(0, 2, 4)], [(0, 9)], [0], f"q_ranges[0] = (0, 2, 4) is no pair of integers: {LEGAL_Q}", id="3"),
        pytest.param([(0, 2.0)], [(0, 9)], [0], f"q_ranges[0] = (0, 2.0) is no pair of integers: {LEGAL_Q}", id="2.0"),
        pytest.param([7], [(0, 9)], [0], f"q_ranges[0] = 7 is no pair of integers: {LEGAL_Q}", id="flat"),
        pytest.param(
            [np.array(7)], [(0, 9)], [0], f"q_ranges[0] = array(7) is no pair of integers: {LEGAL_Q}", id="no dimension"
        ),
        pytest.param(
            [(0, 4), (6, 8), (3, 5)],
            [(0, 9)] * 3,
            [0] * 3,
            "q_ranges[0] = (0, 4) and q_ranges[2] = (3, 5) both hold row 3: a row of q should be in one slice at most "
            "(k_ranges may overlap)",
            id="overlap",
        ),
        pytest.param([(0, 4)], [(0, 9)], [2], "mask_types[0] = 2, but should be 0 (FULL) or 1 (CAUSAL)", id="mask"),
        pytest.param([(0, 4)], [(0, 9)], [True], "mask_types[0] = True, but should be 0 (FULL)", id="mask true"),
        pytest.param(
            [(0, 4)],
            [(0, 9)] * 2,
            [0],
            "q_ranges has 1 entries, k_ranges 2 and mask_types 1: each slice needs one entry in all three",
            id="lengths",
        ),
        pytest.param(None, [], [], "q_ranges = None, but should be a sequence, or a tensor", id="no q ranges"),
        pytest.param([], 3, [], "k_ranges = 3, but should be a sequence, or a tensor", id="a number"),
        pytest.param([(0, 4)], [(0, 9)], 1, "mask_types = 1, but should be a sequence, or a tensor", id="one mask"),
    ],
)
def test_an_illegal_entry_is_named(q_ranges: Any, k_ranges: Any, mask_types: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        slices_from(q_ranges, k_ranges, mask_types, 8, 9)


@pytest.mark.parametrize("total", [-1, 2**31, 4.0, True])
def test_a_total_is_an_int32(total: Any) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"total_k = {total!r}, but should be an integer from 0 to 2147483647")
    ):
        slices_from([], [], [], 8, total)


def test_the_largest_total_is_legal() -> None:
    check_size("total_q", 2**31 - 1, smallest=0)


@pytest.mark.parametrize(
    ("heads", "words"),
    [
        (
            (6, 4, 64),
            "num_heads_k = 4 does not divide num_heads_q = 6: num_heads_q should be a multiple of num_heads_k",
        ),
        ((6, 0, 64), "num_heads_k = 0, but should be an integer from 1"),
        ((0, 1, 64), "num_heads_q = 0, but should be an integer from 1"),
        ((4, 4, 0), "head_dim = 0, but should be an integer from 1"),
    ],
)
def test_heads_that_do_not_divide_are_named(heads: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_heads(*heads)

"""Chosen indices are right by their scores: order and ties are free, all else is a mistake that is named."""

from __future__ import annotations

import math

import pytest
import torch

from refgrid.proving.chosen import compare_chosen
from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison
from refgrid.proving.tolerance import EXACT, Tolerance

NEAR = Tolerance(1e-5, 1e-5)
# Row 0: slot 2 is none, 6 and 3 are equal. Row 1 has two candidates. Row 2 has none.
SCORES = torch.tensor(
    [
        [4.0, 9.0, -math.inf, 6.0, -3.0, 0.0, 6.0],
        [-math.inf, -1.0, -math.inf, -math.inf, 2.0, -math.inf, -math.inf],
        [-math.inf] * 7,
    ],
    dtype=torch.float64,
)
RIGHT = [[1, 3, 6], [4, 1, -1], [-1, -1, -1]]


def held(rows: list[list[int]], scores: torch.Tensor = SCORES, tolerance: Tolerance = NEAR) -> Comparison:
    return compare_chosen("topk_indices", torch.tensor(rows, dtype=torch.int32), scores, tolerance)


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(RIGHT, id="best first"),
        pytest.param([[6, 1, 3], [1, 4, -1], [-1, -1, -1]], id="another order"),
        pytest.param([[1, 3, 6], [-1, 1, 4], [-1, -1, -1]], id="-1 where nothing is left to name"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_best_match_in_any_order(rows: list[list[int]], dtype: torch.dtype) -> None:
    found = held(rows, SCORES.to(dtype), EXACT)

    assert found.matches
    assert found.describe() == "topk_indices matches (atol 0, rtol 0; 100% matched)"
    assert (found.count, found.max_abs_error, found.headroom) == (9, 0.0, 0.0)


@pytest.mark.parametrize("second", [3, 6])
def test_either_of_two_equal_scores_may_be_taken(second: int) -> None:
    assert held([[1, second], [1, 4], [-1, -1]], tolerance=EXACT).matches


def test_scores_may_be_taken_for_each_other_within_the_tolerance() -> None:
    scores = torch.tensor([[5.0, 1.0 + 4e-6, 1.0, 0.9999]])

    assert held([[0, 2]], scores).matches
    assert not held([[0, 3]], scores).matches
    assert not held([[0, 2]], scores, EXACT).matches
    assert not held([[1, 2]], scores).matches, "both are near the second best, but the best is lost"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        pytest.param(
            [[1, 3, 0], *RIGHT[1:]],
            "topk_indices is 0, of score 4, at [0, 2] but should be one of at least 6",
            id="a lower score",
        ),
        pytest.param([[1, 3, 3], *RIGHT[1:]], "is 3 at [0, 2] but should stand once in its row", id="twice"),
        pytest.param([RIGHT[0], [4, 1, 4], RIGHT[2]], "is 4 at [1, 2] but should stand once in its row", id="for none"),
        pytest.param([[7, 3, 6], *RIGHT[1:]], "is 7 at [0, 0] but should be in [0, 7), or -1 for none", id="beyond"),
        pytest.param([[1, -2, 6], *RIGHT[1:]], "is -2 at [0, 1] but should be in [0, 7), or -1", id="below -1"),
        pytest.param([[1, 2, 6], *RIGHT[1:]], "is 2 at [0, 1] but should be a candidate of row 0", id="no candidate"),
        pytest.param(
            [*RIGHT[:2], [0, -1, -1]], "is 0 at [2, 0] but should be a candidate of row 2", id="of an empty row"
        ),
        pytest.param(
            [[1, -1, 3], *RIGHT[1:]],
            "is -1 at [0, 1] but should be a candidate: row 0 has 6",
            id="-1 in the middle where one is left",
        ),
        pytest.param(
            [RIGHT[0], [4, -1, -1], RIGHT[2]], "is -1 at [1, 1] but should be a candidate: row 1 has 2", id="missing"
        ),
    ],
)
def test_a_wrong_index_is_named_with_what_it_should_be(rows: list[list[int]], told: str) -> None:
    found = held(rows)

    assert not found.matches
    assert told in found.describe()
    assert "% matched)" in found.describe()


def test_a_lost_best_is_named_though_what_stands_for_it_is_equal_to_the_last() -> None:
    found = held([[3, 4]], torch.tensor([[9.0, 5.0, 5.0, 5.0, 5.0]]))

    assert found.describe().startswith("topk_indices lacks 0, of score 9, in row 0 but should hold it (atol 1e-5")


def test_no_share_of_illegal_indices_is_enough() -> None:
    half = Tolerance(0.0, 0.0, 0.5)

    assert held([[1, 3, 0], *RIGHT[1:]], tolerance=half).matches, "a lower score counts by the share"
    assert not held([[1, 3, 3], *RIGHT[1:]], tolerance=half).matches
    assert not held([[1, 3, -1], *RIGHT[1:]], tolerance=half).matches


def test_a_row_may_have_fewer_candidates_than_places_or_none_at_all() -> None:
    assert held([[0, -1, -1]], torch.tensor([[1.0]])).matches
    assert held([[-1, -1]], torch.zeros(1, 0)).matches
    assert not held([[0, -1]], torch.zeros(1, 0)).matches


def test_the_numbers_travel_and_the_words_stay() -> None:
    found = held([[1, 3, 0], *RIGHT[1:]])

    read = Comparison.from_dict(found.to_dict())
    assert "told" not in found.to_dict()
    assert not read.matches
    assert read.describe().startswith("topk_indices is off at [0, 2]: 4 but should be 6")


@pytest.mark.parametrize(
    ("actual", "expected", "reason"),
    [
        pytest.param(
            torch.zeros(2), torch.zeros(2, 3), r"topk_indices is float32 \[2\], but should be whole", id="float"
        ),
        pytest.param(torch.zeros(2, 3), torch.zeros(2, 3), r"is float32 \[2, 3\], but should be whole", id="floats"),
        pytest.param(torch.zeros(2, 1).bool(), torch.zeros(2, 3), r"is bool \[2, 1\], but should be whole", id="bool"),
        pytest.param(torch.zeros(2, 1).int(), torch.zeros(3, 3), "should be of 2 rows on cpu", id="rows"),
        pytest.param(torch.zeros(2, 1).int(), torch.zeros(2), "should be of 2 rows on cpu", id="vector"),
        pytest.param(
            torch.zeros(2, 1).int(), torch.zeros(2, 2).int(), r"shape = \[2, 1\], but should be \[2, 2\]", id="k"
        ),
        pytest.param(
            torch.zeros(1, 1).int(), torch.tensor([[0.0, math.nan]]), r"is nan at \[0, 1\], so nothing tells", id="nan"
        ),
    ],
)
def test_what_cannot_be_compared_raises(actual: torch.Tensor, expected: torch.Tensor, reason: str) -> None:
    with pytest.raises(ComparisonError, match=reason):
        compare_chosen("topk_indices", actual, expected, NEAR)


def test_nothing_to_compare_raises() -> None:
    for actual in (torch.zeros(0, 3).int(), torch.zeros(2, 0).int()):
        with pytest.raises(EmptyComparison, match="nothing was compared"):
            compare_chosen("topk_indices", actual, torch.zeros(len(actual), 4), NEAR)


# ---- indices against indices


@pytest.mark.parametrize("rows", [RIGHT, [[6, 3, 1], [-1, 1, 4], [-1, -1, -1]]])
def test_the_same_set_of_another_kernel_matches(rows: list[list[int]]) -> None:
    assert held(rows, torch.tensor(RIGHT, dtype=torch.int32)).matches


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([[1, 3, 0], *RIGHT[1:]], "is 0 at [0, 2] but should be one of those that the other chose for row 0"),
        ([[1, 3, 3], *RIGHT[1:]], "is 3 at [0, 2] but"),
        ([[1, -1, 6], *RIGHT[1:]], "is -1 at [0, 1] but"),
        ([RIGHT[0], [4, 1, 0], RIGHT[2]], "is 0 at [1, 2] but"),
        ([[1, 3, 99], *RIGHT[1:]], "is 99 at [0, 2] but"),
    ],
)
def test_another_set_is_named_and_its_share_counted(rows: list[list[int]], told: str) -> None:
    found = held(rows, torch.tensor(RIGHT))

    assert not found.matches
    assert told in found.describe()
    assert found.matched_ratio == pytest.approx(8 / 9)
    assert held(rows, torch.tensor(RIGHT), Tolerance(0.0, 0.0, 0.8)).matches


def test_a_large_choice_is_held_at_once() -> None:
    scores = torch.rand(64, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = scores.topk(2048, dim=1).indices.int()

    assert compare_chosen("topk_indices", chosen, scores, EXACT).matches
    chosen[63, 2047] = scores[63].argmin()
    told = compare_chosen("topk_indices", chosen, scores, NEAR).describe()
    assert f"is {chosen[63, 2047]}, of score" in told
    assert "at [63, 2047] but should be one of at least" in told

"""Rows as vectors: a factor that every element's tolerance lets pass is seen, and what has no norm is left alone."""

from __future__ import annotations

import json
import math

import pytest
import torch

from refgrid.proving.compare import Comparison, compare
from refgrid.proving.rows import FLOOR, SHORTEST, furthest_row, index_of
from refgrid.proving.tolerance import Tolerance

LOOSE = Tolerance(8e-3, 1e-2)
ROWS = Tolerance(8e-3, 1e-2, row_norm=4e-3)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_factor_of_one_percent_passes_every_element_and_fails_the_row() -> None:
    expected = numbers(3, 64)
    actual = expected.clone()
    actual[1] *= 1.01

    assert compare("C", actual, expected, LOOSE).matches
    found = compare("C", actual, expected, ROWS)

    assert not found.matches
    assert found.describe().startswith("C: row [1] as a whole is off by 0.01 of its norm but should be at most 0.004")
    assert found.headroom == pytest.approx(2.5, rel=1e-4)


def test_rounding_to_bfloat16_is_within_one_rounding_of_the_norm() -> None:
    expected = numbers(64, 128)

    found = furthest_row(expected.bfloat16().float(), expected, 2.0**-8)

    assert found is not None
    assert 1e-3 < found.error < 2.0**-8
    assert found.within


def test_the_index_is_that_of_a_row_of_any_shape() -> None:
    expected = numbers(2, 3, 4, 16)
    actual = expected.clone()
    actual[1, 2, 3] += 1

    found = furthest_row(actual, expected, 1e-3)

    assert found is not None
    assert found.row == (1, 2, 3)


@pytest.mark.parametrize("shape", [(), (SHORTEST - 1,), (4, SHORTEST - 1), (0, SHORTEST)])
def test_rows_without_a_norm_that_means_something_are_not_judged(shape: tuple[int, ...]) -> None:
    assert furthest_row(torch.zeros(shape), torch.ones(shape), 1e-3) is None


def test_what_is_not_finite_is_left_to_the_elements() -> None:
    expected = numbers(2, 16)
    actual = expected.clone()
    actual[0, 0] = expected[0, 0] = math.inf
    actual[1, 1] = math.nan

    found = furthest_row(actual, expected, 1e-3)

    assert found is not None
    assert found.error == 0


def test_a_row_of_zeros_that_should_be_zeros_is_right_and_any_other_is_not() -> None:
    expected = torch.zeros(2, 16)

    right, wrong = furthest_row(expected, expected, 1e-3), furthest_row(expected + 1e-3, expected, 1e-3)

    assert right is not None
    assert right.error == 0
    assert wrong is not None
    assert wrong.error == math.inf
    assert not wrong.within


def test_what_is_left_after_cancelling_counts_by_the_typical_row() -> None:
    expected = torch.ones(1000, 16)
    expected[7] = 1e-9
    actual = expected.clone()
    actual[7] = 1e-6

    found = furthest_row(actual, expected, 2e-3)

    assert found is not None
    assert found.row == (7,)
    assert found.error == pytest.approx(1e-6 / FLOOR, rel=2e-3)
    assert found.within


def test_many_blocks_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(33, 16)
    actual = expected * (1 + 1e-3 * numbers(33, 16))
    whole = furthest_row(actual, expected, 1e-3)
    monkeypatch.setattr("refgrid.proving.rows._BLOCK", {"cpu": 40})

    assert furthest_row(actual, expected, 1e-3) == whole


def test_the_record_of_a_row_is_read_back() -> None:
    expected = numbers(3, 64)
    found = compare("C", expected * 1.01, expected, ROWS)

    back = Comparison.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))

    assert back.rows is not None
    assert back.rows.row == found.rows.row  # type: ignore[union-attr]
    assert not back.matches
    assert Comparison.from_dict({k: v for k, v in found.to_dict().items() if k != "rows"}).rows is None  # older records


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 1, 5), (2, 3, 4, 5)], ids=str)
def test_every_element_is_found_by_its_number(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).reshape(shape)

    for place in range(numbers.numel()):
        assert numbers[index_of(place, shape)] == place

"""Rows as vectors: a factor that every element's tolerance lets pass is seen, and what has no norm is left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_bytes

from refgrid.proving import rows
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


SHAPES = [(2**23,), (4, 2**21), (2**19, 16), (2**16, 128)]  # what is copied of other strides is of one size


@pytest.mark.parametrize("shape", SHAPES, ids=["one row", "long rows", "short rows", "usual rows"])
@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.mT.contiguous().mT], ids=["contiguous", "transposed"])
def test_rows_of_any_length_take_less_memory_than_one_tensor_and_a_half(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # what other threads take, the measure does not see
    expected = numbers(*shape).bfloat16()
    actual, expected = (view(x) if x.ndim > 1 else x for x in (expected * 1.01, expected))

    peak = peak_bytes(lambda: compare("x", actual, expected, ROWS))

    assert peak < 1.5 * expected.nbytes


def test_the_measure_sees_rows_that_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers(2**22).bfloat16()
    monkeypatch.setattr("refgrid.proving.rows._BLOCK", {"cpu": 2**22})

    assert peak_bytes(lambda: furthest_row(expected, expected, 1e-3)) > 1.5 * expected.nbytes


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(1, 7), max_size=2).flatmap(
        lambda head: st.integers(SHORTEST, 60).map(lambda last: (*head, last))
    ),
    block=st.integers(1, 200),
    piece=st.integers(1, 100),
    threads=st.sampled_from([1, 3]),
    permuted=st.booleans(),
    odd=st.booleans(),
)
def test_however_rows_are_cut_they_are_those_of_a_naive_formulation(
    shape: tuple[int, ...], block: int, piece: int, threads: int, permuted: bool, odd: bool
) -> None:
    expected, noise = numbers(2, *shape)
    actual = expected + 1e-2 * noise
    if odd:
        actual.view(-1)[block % actual.numel()] = math.nan
    if permuted and len(shape) > 1:
        actual, expected = (x.transpose(0, -2).contiguous().transpose(0, -2) for x in (actual, expected))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refgrid.proving.rows._BLOCK", {"cpu": block})
        patch.setattr("refgrid.proving.measure._PIECE", piece)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        found = furthest_row(actual, expected, 1e-3)

    wanted = naive_rows(actual, expected)
    assert found is not None
    assert found.error == pytest.approx(float(wanted.max()), rel=1e-12)
    assert float(wanted[found.row]) == pytest.approx(found.error, rel=1e-12)


def naive_rows(actual: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Of each row the error over the norm, of what is finite on both sides."""
    finite = actual.isfinite() & expected.isfinite()
    a, e = (x.double().where(finite, torch.tensor(0.0, dtype=torch.float64)) for x in (actual, expected))
    return (a - e).norm(dim=-1) / e.norm(dim=-1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_what_is_measured_in_buffers_has_the_bits_of_the_careful_way(dtype: torch.dtype) -> None:
    expected, noise = numbers(2, 100, 77)
    actual, expected = (expected + 1e-2 * noise).to(dtype), expected.to(dtype)
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32

    found = rows._usual(actual, expected, torch.empty(3, actual.numel(), dtype=wide))

    assert torch.equal(found, rows._careful(actual, expected))


INF, NAN = math.inf, math.nan
ODD = [(-INF, -INF), (NAN, NAN), (INF, -INF), (NAN, 1.0), (1.0, -INF), (-INF, NAN)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("pair", ODD, ids=str)
@pytest.mark.parametrize("largest", [1.0, INF], ids=["usual", "squares overflow"])
def test_what_is_not_finite_is_left_out_in_the_buffers_too(
    dtype: torch.dtype, pair: tuple[float, float], largest: float
) -> None:
    expected, noise = numbers(2, 100, 77)
    actual, expected = (expected + 1e-2 * noise).to(dtype), expected.to(dtype)
    expected[3, 3] = min(largest, torch.finfo(dtype).max)
    actual[40] = -expected[3, 3]
    for side, value in zip((actual, expected), pair, strict=True):
        side.view(-1)[::5] = value
        side[7:9] = value  # rows without anything finite
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32

    found = rows._usual(actual, expected, torch.empty(3, actual.numel(), dtype=wide))

    assert torch.equal(found, rows._careful(actual, expected))
    assert found[:, 7:9].eq(0).all()
    assert not found.isnan().any()

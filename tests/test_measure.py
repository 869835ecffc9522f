"""The measures: equal to a naive formulation however the tensors are cut, in bounded memory, and on any strides."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_compare import naive_compare
from peak_memory import peak_bytes

from refgrid.proving import measure as module
from refgrid.proving.compare import compare
from refgrid.proving.measure import measure
from refgrid.proving.tolerance import EXACT, Tolerance

SUMS = ("mean_abs_error", "mean_rel_error", "mse", "cosine")
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan

# Zeros, ties, bounds that are met, a few of what is not finite, and numbers of any size.
VALUES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 2.5]), st.floats(-100, 100, width=16), st.sampled_from([NAN, INF, -INF])
)
PAIRS = st.lists(
    st.one_of(VALUES.map(lambda x: (x, x)), st.tuples(VALUES, VALUES), VALUES.map(lambda x: (x * 1.01 + 0.125, x))),
    min_size=1,
    max_size=40,
)
BOUNDS = st.sampled_from([EXACT, Tolerance(0.5, 0.25), Tolerance(0, 0.25), Tolerance(0.125, 0.01, 0.5)])


def demand_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    """Fail unless all numbers are those of the naive formulation; only sums may differ, by their rounding."""
    found = compare("x", actual, expected, tolerance)
    wanted = naive_compare(actual, expected, tolerance)

    assert [(worst.index, worst.error) for worst in found.worst] == wanted.pop("worst")
    values = [(worst.actual, worst.expected) for worst in found.worst]
    assert repr(values) == repr([(actual[w.index].item(), expected[w.index].item()) for w in found.worst])
    assert found.needed_atol == pytest.approx(wanted.pop("needed_atol"), rel=1e-12, abs=1e-13)
    sums = [wanted.pop(name) for name in SUMS]
    assert [getattr(found, name) for name in SUMS] == pytest.approx(sums, rel=1e-12, abs=1e-15, nan_ok=True)
    assert found.matched_ratio == pytest.approx(wanted.pop("matched_ratio"), abs=1e-15)
    assert repr({name: getattr(found, name) for name in wanted}) == repr(wanted)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(PAIRS, BOUNDS, st.sampled_from(FLOATS), st.integers(1, 45), st.sampled_from([1, 3]))
def test_every_number_is_that_of_the_naive_formulation(
    pairs: list[tuple[float, float]], bound: Tolerance, dtype: torch.dtype, chunk: int, threads: int
) -> None:
    actual, expected = (torch.tensor(side, dtype=torch.float64).to(dtype) for side in zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", {"cpu": chunk})
        patch.setattr(module, "_PIECE", 4)
        patch.setattr(torch, "get_num_threads", lambda: threads)

        demand_equal(actual, expected, bound)


ODD = st.sampled_from([INF, -INF, NAN, 0.0, 1.5])
STRETCHES = st.lists(
    st.one_of(
        PAIRS,
        st.lists(ODD.map(lambda x: (x, x)), min_size=1, max_size=40),  # chunks of nothing finite, or of zeros, too
        st.lists(st.one_of(ODD.map(lambda x: (x, x)), st.tuples(st.just(2.0), st.just(2.125))), min_size=1),
        st.lists(st.tuples(ODD, ODD), min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=5,
).map(lambda lists: [pair for pairs in lists for pair in pairs])


@settings(max_examples=400, deadline=None, derandomize=True)
@given(STRETCHES, BOUNDS, st.sampled_from(FLOATS), st.integers(1, 20))
def test_in_buffers_every_number_is_that_of_the_careful_way(
    pairs: list[tuple[float, float]], bound: Tolerance, dtype: torch.dtype, chunk: int
) -> None:
    actual, expected = (torch.tensor(side, dtype=torch.float64).to(dtype) for side in zip(*pairs, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK", {"cpu": chunk})
        found = measure(actual, expected, bound)
        patch.setattr(module._Bench, "_usual", lambda *_: None)
        wanted = measure(actual, expected, bound)

    assert found.total == pytest.approx(wanted.total, rel=1e-12, abs=0)
    assert (found.largest, found.worst) == (wanted.largest, wanted.worst)


@pytest.fixture
def careful(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places of the chunks of ten elements that were measured the careful way."""
    places, way = [], module._careful

    def noted(actual: torch.Tensor, expected: torch.Tensor, start: int, tolerance: Tolerance) -> torch.Tensor:
        places.append(start)
        return way(actual, expected, start, tolerance)

    monkeypatch.setattr(module, "_careful", noted)
    monkeypatch.setattr(module, "_CHUNK", {"cpu": 10})
    return places


def _off_by_a_little(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    expected = torch.randn(count, generator=torch.Generator().manual_seed(2))
    return expected * 1.01, expected


@pytest.mark.parametrize("values", [[-INF], [INF], [NAN], [0.0], [-INF, NAN, 0.0, INF]], ids=str)
@pytest.mark.parametrize("bound", [Tolerance(8e-3, 1e-2), Tolerance(0, 1e-3), EXACT], ids=["usual", "no atol", "exact"])
def test_what_agrees_stays_in_the_buffers(careful: list[int], values: list[float], bound: Tolerance) -> None:
    actual, expected = _off_by_a_little(95)
    for side in (actual, expected):
        for first, value in enumerate(values):
            side[first :: 3 * len(values)] = value
        side[20:40] = values[0]  # two chunks hold nothing else

    demand_equal(actual, expected, bound)

    assert careful == []


OTHERS = [(NAN, 1.0), (1.0, NAN), (NAN, INF), (-INF, NAN), (INF, -INF), (-INF, 1.0), (1.0, INF)]


@pytest.mark.parametrize(("one", "other"), OTHERS)
@pytest.mark.parametrize("agreed", [0.0, NAN, -INF])
def test_a_chunk_in_which_something_disagrees_is_measured_the_careful_way(
    careful: list[int], one: float, other: float, agreed: float
) -> None:
    actual, expected = _off_by_a_little(95)
    actual[::4] = expected[::4] = agreed
    actual[33], expected[33] = one, other

    demand_equal(actual, expected, Tolerance(8e-3, 1e-2))

    assert careful == [30]


@pytest.mark.parametrize(("one", "other"), OTHERS)
def test_where_everything_disagrees_the_first_are_the_worst(careful: list[int], one: float, other: float) -> None:
    actual, expected = torch.full((95,), one), torch.full((95,), other)

    demand_equal(actual, expected, Tolerance(8e-3, 1e-2))

    assert careful == list(range(0, 95, 10))
    assert [place for place, _ in measure(actual, expected, EXACT).worst] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_wrong_sum_would_be_noticed(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    expected = torch.tensor([1.0, 2.0, -4.0], dtype=dtype)
    monkeypatch.setattr(module, "_squares", lambda values: values.abs().sum().item())

    with pytest.raises(AssertionError):
        demand_equal(expected + 0.5, expected, Tolerance(0.1, 0))


@pytest.mark.parametrize("values", [1e300, 1e-310], ids=["squares overflow", "subnormal"])
def test_what_leaves_the_range_of_float64_raises_nothing(values: float) -> None:
    expected = torch.tensor([values, 1.0], dtype=torch.float64)

    found = compare("x", expected * 2, expected, Tolerance(0, 1))

    assert (found.matches, found.max_abs_error, found.headroom) == (True, max(values, 1.0), 1)


TRANSPOSED: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x.permute(2, 0, 1),
    lambda x: x.permute(1, 0, 2)[:, ::2],
    lambda x: x[None].transpose(0, 3),
    lambda x: x[:1].expand(9, *x.shape[1:]),
]


@pytest.mark.parametrize("view", TRANSPOSED, ids=["permuted", "strided", "leading one", "expanded"])
def test_strides_change_nothing(monkeypatch: pytest.MonkeyPatch, view: Callable[..., torch.Tensor]) -> None:
    monkeypatch.setattr(module, "_PIECE", 16)
    generator = torch.Generator().manual_seed(3)
    expected, noise = torch.randn(2, 4, 6, 10, generator=generator)
    expected, actual = view(expected), view(expected + 0.01 * noise.round())

    demand_equal(actual, expected, Tolerance(1e-3, 0))


def _tensors(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    expected = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return expected * 1.001, expected


@pytest.mark.parametrize("view", [lambda x: x, torch.t], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("atol", [1.0, 0.0], ids=["match", "mismatch"])
def test_the_memory_taken_is_less_than_that_of_one_tensor_and_a_half(
    monkeypatch: pytest.MonkeyPatch, view: Any, atol: float
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # what other threads take, the measure does not see
    actual, expected = map(view, _tensors((2**12, 2**11)))

    peak = peak_bytes(lambda: compare("x", actual, expected, Tolerance(atol, 0, row_norm=4e-3)))

    assert 2**20 < peak < 1.5 * expected.nbytes
    with pytest.raises(AssertionError):  # the same measure of a comparison that holds whole temporaries
        assert peak_bytes(lambda: torch.isclose(actual, expected)) < 1.5 * expected.nbytes


@pytest.mark.parametrize("other", [-INF, NAN], ids=["agreeing", "disagreeing"])
def test_what_is_not_finite_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch, other: float) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    actual, expected = _tensors((2**12, 2**11))
    actual[:, ::64], expected[:, ::64] = other, -INF

    peak = peak_bytes(lambda: compare("x", actual, expected, Tolerance(1, 0, row_norm=4e-3)))

    assert 2**20 < peak < 1.5 * expected.nbytes

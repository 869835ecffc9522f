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

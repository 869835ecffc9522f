"""The comparator: each of its guards fires, its numbers can be redone by hand, and its words name what is wrong."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refgrid.proving import measure as module
from refgrid.proving.compare import Comparison, ComparisonError, EmptyComparison, compare
from refgrid.proving.tolerance import EXACT, Tolerance

INF, NAN = math.inf, math.nan
LOOSE = Tolerance(0.5, 0.25)


def held(actual: Any, expected: Any, tolerance: Tolerance = LOOSE, dtype: torch.dtype = torch.float32) -> Comparison:
    return compare("lse", torch.tensor(actual, dtype=dtype), torch.tensor(expected, dtype=dtype), tolerance)


def test_every_number_can_be_redone_by_hand() -> None:
    found = held([[1.0, -2.0], [4.0, 0.0]], [[1.0, -4.0], [2.0, 1.0]])

    assert (found.count, found.matched_ratio, found.matches) == (4, 0.25, False)
    assert (found.max_abs_error, found.mean_abs_error, found.mse) == (2, 5 / 4, 9 / 4)
    assert (found.max_rel_error, found.mean_rel_error) == (1, (0 + 0.5 + 1 + 1) / 4)
    assert found.cosine == pytest.approx(17 / math.sqrt(21 * 22))
    assert found.headroom == 2 / (0.5 + 0.25 * 2)
    assert [(worst.index, worst.error) for worst in found.worst] == [
        ((0, 1), 2),
        ((1, 0), 2),
        ((1, 1), 1),
        ((0, 0), 0),
    ]
    assert (found.atol, found.rtol, found.required_matched_ratio) == (0.5, 0.25, 1)


class TestNonFinite:
    """Non-finite values must agree position by position."""

    @pytest.mark.parametrize(
        ("actual", "expected"),
        [
            pytest.param(NAN, 1.0, id="nan in the reference"),
            pytest.param(1.0, NAN, id="nan in the truth"),
            pytest.param(INF, 1.0, id="inf in the reference"),
            pytest.param(1.0, INF, id="inf in the truth"),
            pytest.param(INF, -INF, id="inf by sign"),
            pytest.param(NAN, INF, id="nan for inf"),
            pytest.param(-INF, NAN, id="inf for nan"),
        ],
    )
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_disagreement_never_matches(self, actual: float, expected: float, dtype: torch.dtype) -> None:
        lenient = Tolerance(1e9, 1e9, 0.01)

        found = held([2.0, 3.0, actual], [2.0, 5.0, expected], lenient, dtype)

        assert not found.matches
        assert found.nonfinite_mismatches == 1
        assert (found.worst[0].index, found.worst[0].error) == ((2,), INF)
        assert (found.max_abs_error, found.max_rel_error, found.headroom) == (INF, INF, INF)
        assert (found.mean_abs_error, found.mse) == (1, 2)  # of what is finite, so that they still say something

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    def test_an_agreement_is_no_error(self, value: float) -> None:
        found = held([value, 1.0], [value, 1.0], EXACT)

        assert found.matches
        assert (found.matched_ratio, found.nonfinite_mismatches, found.headroom) == (1, 0, 0)

    def test_where_nothing_is_finite_a_mean_is_no_number(self) -> None:
        found = held([-INF, -INF], [-INF, -INF])

        assert found.matches
        numbers = (found.mean_abs_error, found.mse, found.cosine, found.max_rel_error, found.mean_rel_error)
        assert all(math.isnan(number) for number in numbers)

    def test_the_words_say_whose_it_is(self) -> None:
        assert held([[0.12, NAN]], [[0.12, 0.5]]).describe().startswith("lse is nan at [0, 1] but should be 0.5 (")
        assert held([[0.12, 0.5]], [[0.12, NAN]]).describe().startswith("lse is 0.5 at [0, 1] but should be nan (")
        assert held([INF], [-INF]).describe().startswith("lse is inf at [0] but should be -inf (")


class TestWhatCannotBeCompared:
    @pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0, 2)])
    def test_nothing(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(EmptyComparison, match=r"lse has no element \(shape \["):
            compare("lse", torch.zeros(shape), torch.zeros(shape), LOOSE)

    @pytest.mark.parametrize(
        ("actual", "message"),
        [
            pytest.param(torch.zeros(2, 3), "lse.shape = [2, 3], but should be [3, 2]", id="shape"),
            pytest.param(torch.zeros(6), "lse.shape = [6], but should be [3, 2]", id="rank"),
            pytest.param(torch.zeros(1, 2), "lse.shape = [1, 2], but should be [3, 2]", id="no broadcasting"),
            pytest.param(torch.zeros(3, 2).half(), "lse.dtype = float16, but should be float32", id="dtype"),
            pytest.param(torch.zeros(3, 2, device="meta"), "lse.device = meta, but should be cpu", id="device"),
        ],
    )
    def test_different_things(self, actual: torch.Tensor, message: str) -> None:
        with pytest.raises(ComparisonError) as caught:
            compare("lse", actual, torch.zeros(3, 2), LOOSE)

        assert str(caught.value) == message


class TestBound:
    def test_an_error_at_the_bound_matches_and_one_beyond_does_not(self) -> None:
        at = held([4.0 + 1.5], [4.0])
        beyond = held([4.0 + 1.5 + 1e-6], [4.0])

        assert (at.matches, at.headroom) == (True, 1)
        assert not beyond.matches
        assert beyond.headroom > 1

    def test_the_bound_grows_with_the_truth_and_not_with_the_reference(self) -> None:
        assert not held([8.0], [1.0], Tolerance(0, 1)).matches
        assert held([1.0], [8.0], Tolerance(0, 1)).matches

    def test_an_error_where_none_is_allowed_has_no_headroom(self) -> None:
        assert held([1e-30], [0.0], Tolerance(0, 0.1)).headroom == INF
        assert held([0.0], [0.0], Tolerance(0, 0.1)).headroom == 0

    def test_the_ratio_is_met_by_just_enough_elements(self) -> None:
        tolerance = Tolerance(0.1, 0, 0.85)

        assert held([0.0] * 17 + [1.0] * 3, [0.0] * 20, tolerance).matches
        assert not held([0.0] * 16 + [1.0] * 4, [0.0] * 20, tolerance).matches

    @pytest.mark.parametrize("copies", [1, 7, 1000])
    def test_more_data_allows_no_more(self, copies: int) -> None:
        found = held([1.0, 2.6] * copies, [1.0, 2.0] * copies, Tolerance(0.5, 0))

        assert (found.matched_ratio, found.matches) == (0.5, False)
        assert found.headroom == held([2.6], [2.0], Tolerance(0.5, 0)).headroom

    def test_a_small_error_is_not_lost_in_the_dtype(self) -> None:
        found = held([1.0 + 2.0**-23], [1.0], Tolerance(2.0**-24, 0))

        assert (found.matches, found.max_abs_error) == (False, 2.0**-23)

    def test_relative_errors_leave_out_what_should_be_zero(self) -> None:
        assert held([1.0, 3.0], [0.0, 2.0]).max_rel_error == 0.5
        assert math.isnan(held([1.0], [0.0]).max_rel_error)

    @pytest.mark.parametrize(
        ("actual", "expected", "cosine"),
        [
            pytest.param([0.0, 0.0], [0.0, 0.0], 1, id="both zero"),
            pytest.param([0.0, 0.0], [0.0, 1.0], 0, id="one zero"),
            pytest.param([1.0, 2.0], [-2.0, -4.0], -1, id="opposite"),
            pytest.param([0.1, 0.3], [0.1, 0.3], 1, id="equal"),
        ],
    )
    def test_cosine(self, actual: list[float], expected: list[float], cosine: float) -> None:
        assert held(actual, expected).cosine == pytest.approx(cosine, abs=1e-15)


class TestWholeNumbers:
    """Integers and booleans are right or wrong, whatever the tolerance."""

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
    def test_equal_or_not(self, dtype: torch.dtype) -> None:
        lenient = Tolerance(100, 100)

        assert held([1, 0, 1], [1, 0, 1], lenient, dtype).matches
        found = held([1, 0, 1], [1, 1, 1], lenient, dtype)

        assert (found.matches, found.worst[0].index, found.worst[0].error) == (False, (1,), 1)
        assert (found.atol, found.rtol, found.headroom) == (0, 0, INF)

    def test_neighbours_beyond_what_float64_holds(self) -> None:
        found = held([2**53 + 1], [2**53], dtype=torch.int64)

        assert (found.matches, found.max_abs_error) == (False, 1)
        assert "is off at [0]: 9007199254740993 but should be 9007199254740992" in found.describe()

    def test_a_difference_beyond_int64(self) -> None:
        assert held([2**63 - 1], [-(2**63)], dtype=torch.int64).max_abs_error == 2.0**64

    def test_uint8_does_not_wrap_around(self) -> None:
        assert held([0], [255], dtype=torch.uint8).max_abs_error == 255


class TestWorst:
    def test_indices_are_those_of_the_shape(self) -> None:
        expected = torch.zeros(3, 5, 7)
        actual = expected.clone()
        places = [(2, 4, 6), (0, 0, 1), (1, 3, 0), (2, 0, 0), (0, 4, 6), (1, 1, 1)]
        for size, place in enumerate(reversed(places), 1):
            actual[place] = size

        found = compare("x", actual, expected, LOOSE)

        assert [worst.index for worst in found.worst] == places[:5]
        assert [worst.actual for worst in found.worst] == [6, 5, 4, 3, 2]

    def test_indices_do_not_depend_on_strides(self) -> None:
        expected = torch.zeros(3, 4).t()
        actual = expected.clone()
        actual[3, 1] = 9

        assert compare("x", actual, expected, LOOSE).worst[0].index == (3, 1)

    def test_what_is_allowed_does_not_stand_before_what_is_not(self) -> None:
        found = held([1005.0, 1.0], [1000.0, 0.0], Tolerance(0, 1e-2))

        assert [worst.index for worst in found.worst] == [(1,), (0,)]
        assert found.describe().startswith("lse is off at [1]: 1 but should be 0 (")
        assert found.worst[1].error == 5

    def test_non_finite_disagreement_stands_before_any_error(self) -> None:
        assert [worst.index for worst in held([1e30, 0.0, NAN], [0.0, 0.0, 0.0]).worst] == [(2,), (0,), (1,)]

    def test_the_first_of_equals_comes_first(self) -> None:
        assert [worst.index for worst in held([1.0] * 9, [0.0] * 9).worst] == [(i,) for i in range(5)]

    @pytest.mark.parametrize("count", [1, 2, 5, 6])
    def test_no_place_stands_twice(self, count: int) -> None:
        found = held([0.0] * count, [0.0] * count)

        assert [worst.index for worst in found.worst] == [(i,) for i in range(min(count, 5))]

    def test_a_single_number_has_no_index(self) -> None:
        assert held(2.0, 1.0).worst[0].index == ()


class TestWords:
    def test_a_mismatch_names_place_value_and_bound(self) -> None:
        expected = torch.full((4, 8), 2.5)
        actual = expected.clone()
        expected[3, 7], actual[3, 7] = 2.86, 4.12

        found = compare("lse", actual, expected, Tolerance(1e-3, 1e-5))

        assert found.describe() == (
            "lse is off at [3, 7]: 4.12 but should be 2.86 (atol 1e-3, rtol 1e-5; 96.87% matched)"
        )

    def test_a_match_is_not_told_as_a_mismatch(self) -> None:
        assert held([1.0], [1.25]).describe() == "lse matches (atol 5e-1, rtol 2.5e-1; 100% matched)"

    def test_a_required_ratio_is_told(self) -> None:
        found = held([0.0, 1.0], [0.0, 0.0], Tolerance(0, 0, 0.85))

        assert found.describe().endswith("(atol 0, rtol 0; 50% matched of 85% required)")

    def test_one_bad_element_in_a_million_is_not_all(self) -> None:
        actual = torch.zeros(10**6)
        actual[77] = 1

        assert "99.99% matched" in compare("x", actual, torch.zeros(10**6), LOOSE).describe()

    def test_close_values_are_told_apart(self) -> None:
        assert ": 1.00000012 but should be 1 (" in held([1 + 2.0**-23], [1.0], EXACT).describe()
        assert ": 100000008 but should be 100000000 (" in held([100000008.0], [100000000.0], EXACT).describe()


class TestRecord:
    @pytest.mark.parametrize(
        ("actual", "expected"),
        [
            pytest.param([1.0, 2.0], [1.0, 2.0], id="match"),
            pytest.param([NAN, 1.0], [INF, 5.0], id="non-finite"),
            pytest.param([-INF], [-INF], id="nothing finite"),
        ],
    )
    def test_it_survives_strict_json(self, actual: list[float], expected: list[float]) -> None:
        found = held(actual, expected)

        told = json.loads(json.dumps(found.to_dict(), allow_nan=False))

        assert repr(Comparison.from_dict(told)) == repr(found)

    def test_only_digits_are_lost_and_never_the_verdict(self) -> None:
        found = replace(held([1 / 3], [2 / 3], dtype=torch.float64), matched_ratio=1 - 2**-40, mse=1 / 3)

        told = Comparison.from_dict(found.to_dict())

        assert told.matched_ratio == found.matched_ratio
        assert not told.matches
        assert told.mse == 0.333333333

    def test_any_float32_survives(self) -> None:
        value = torch.tensor(0.1).item()

        assert torch.tensor(held([value], [1.0]).to_dict()["worst"][0]["actual"]).item() == value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = torch.randn(9, 11, generator=generator).mul(3).round(decimals=1)
    actual = expected + torch.randn(9, 11, generator=generator).round()  # whole steps: many equal errors
    actual, expected = actual.to(dtype), expected.to(dtype)
    if dtype.is_floating_point:
        actual[4, 4], expected[7, 7], actual[8, 0], expected[8, 0] = NAN, INF, -INF, -INF
    whole = asdict(compare("x", actual, expected, LOOSE))

    monkeypatch.setattr(module, "_CHUNK", {"cpu": chunk})
    parts = asdict(compare("x", actual, expected, LOOSE))

    sums = ("mean_abs_error", "mean_rel_error", "mse", "cosine")
    assert [parts.pop(name) for name in sums] == pytest.approx([whole.pop(name) for name in sums], nan_ok=True)
    assert repr(parts) == repr(whole)


def test_a_gradient_is_neither_needed_nor_kept() -> None:
    actual = torch.ones(3, requires_grad=True) * 2
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        assert compare("x", actual, torch.full((3,), 2.0), LOOSE).matches

    assert not kept


def test_inputs_are_left_alone() -> None:
    actual, expected = torch.tensor([NAN, 1.0, 2.0]), torch.tensor([1.0, INF, 2.0])

    compare("x", actual, expected, LOOSE)

    assert repr(actual.tolist() + expected.tolist()) == "[nan, 1.0, 2.0, 1.0, inf, 2.0]"


def tensors(elements: st.SearchStrategy[float]) -> st.SearchStrategy[torch.Tensor]:
    shapes = st.lists(st.integers(1, 5), max_size=3)
    return shapes.flatmap(
        lambda shape: st.lists(elements, min_size=math.prod(shape), max_size=math.prod(shape)).map(
            lambda values: torch.tensor(values, dtype=torch.float32).reshape(shape)
        )
    )


ANY = st.floats(width=32)
FINITE = st.floats(-1e4, 1e4, width=32)
BOUND = st.builds(Tolerance, st.floats(0, 10), st.floats(0, 10), st.floats(0.01, 1))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tensors(ANY), BOUND)
def test_anything_matches_itself(values: torch.Tensor, tolerance: Tolerance) -> None:
    found = compare("x", values, values.clone(), tolerance)

    assert found.matches
    assert (found.matched_ratio, found.headroom, found.max_abs_error) == (1, 0, 0)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tensors(FINITE), BOUND, st.data())
def test_one_element_beyond_the_bound_never_matches(
    values: torch.Tensor, bound: Tolerance, data: st.DataObject
) -> None:
    expected = values.double()
    actual, place = expected.clone(), data.draw(st.integers(0, expected.numel() - 1))
    target = expected.reshape(-1)[place]
    beyond = (bound.atol + bound.rtol * target.abs()) * 1.001 + 1e-6
    actual.view(-1)[place] = target + data.draw(st.sampled_from([-1, 1])) * beyond

    found = compare("x", actual, expected, Tolerance(bound.atol, bound.rtol))

    assert not found.matches
    assert found.headroom > 1
    assert found.matched_ratio == pytest.approx(1 - 1 / expected.numel())
    assert actual[found.worst[0].index] == actual.reshape(-1)[place]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(tensors(ANY), st.randoms(use_true_random=False))
def test_it_agrees_with_torch(expected: torch.Tensor, random: Random) -> None:
    values = expected.flatten().tolist()
    actual = torch.tensor([random.choice((x, x, x + 0.6, x * 1.3, NAN, INF)) for x in values]).reshape(expected.shape)

    close = torch.isclose(actual.double(), expected.double(), rtol=0.25, atol=0.5, equal_nan=True)

    assert compare("x", actual, expected, LOOSE).matched_ratio == close.sum().item() / close.numel()

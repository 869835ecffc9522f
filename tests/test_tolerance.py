"""Tolerances: bad ones are refused, every dtype has a row with a source, and the most specific row wins."""

from __future__ import annotations

import math

import pytest

from refgrid.dataset.definition import DTYPES
from refgrid.proving.tolerance import EXACT, TABLE, TRUTH_LIMITS, Tolerance, looser, tolerance_for, tolerance_of

BOUNDS = [
    pytest.param("float32", Tolerance(1e-5, 1e-5), id="float32"),
    pytest.param("float16", Tolerance(1e-3, 1e-3), id="float16"),
    pytest.param("bfloat16", Tolerance(8e-3, 1e-2), id="bfloat16"),
    pytest.param("float8_e4m3fn", Tolerance(1e-1, 2e-1, 0.85), id="float8_e4m3fn"),
    pytest.param("float4_e2m1", Tolerance(1e-1, 2e-1, 0.85), id="float4_e2m1"),
]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field} {value}")
        for field, values in {
            "atol": (-1e-9, math.inf, math.nan),
            "rtol": (-1.0, math.inf, math.nan),
            "required_matched_ratio": (0.0, -0.5, 1.0001, math.nan),
        }.items()
        for value in values
    ],
)
def test_a_bound_that_bounds_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}, but should be"):
        Tolerance(**{"atol": 0.0, "rtol": 0.0, field: value})


def test_the_edges_of_what_is_legal_are_legal() -> None:
    assert Tolerance(0, 0, 1) == EXACT
    assert Tolerance(0, 0, 1e-9).required_matched_ratio == 1e-9


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS)
def test_the_guideline_is_where_every_op_starts(dtype: str, bound: Tolerance) -> None:
    assert tolerance_for("an op without rows", dtype, "output") == bound


@pytest.mark.parametrize("dtype", ["int64", "int32", "int16", "int8", "uint8", "bool"])
def test_whole_numbers_are_exact(dtype: str) -> None:
    assert tolerance_for("topk", dtype, "indices") == EXACT


def test_every_row_has_a_legal_dtype_and_says_where_it_comes_from() -> None:
    assert {dtype for _, dtype, _ in TABLE} <= set(DTYPES)
    assert all(len(source) > 10 for _, source in TABLE.values())


def test_a_truth_with_a_bound_of_its_own_has_a_measured_error_beside_it() -> None:
    assert all(any(digit.isdigit() for digit in limit.measured) for limit in TRUTH_LIMITS)


def test_only_a_row_with_a_truth_is_looser_than_the_guideline() -> None:
    for (op, dtype, output), (bound, _) in TABLE.items():
        ceiling = TABLE["*", dtype, "*"][0]
        assert looser(bound, ceiling) == ceiling, f"{op}, {dtype}, {output} is looser than the guideline"


@pytest.mark.parametrize(
    ("asked", "bound"),
    [
        pytest.param(("gqa", "float32", "lse"), 4.0, id="op and output"),
        pytest.param(("gqa", "float32", "output"), 3.0, id="op"),
        pytest.param(("gemm", "float32", "lse"), 2.0, id="output"),
        pytest.param(("gemm", "float32", "C"), 1.0, id="dtype"),
    ],
)
def test_the_most_specific_row_wins(monkeypatch: pytest.MonkeyPatch, asked: tuple[str, str, str], bound: float) -> None:
    rows = [("*", "*", 1.0), ("*", "lse", 2.0), ("gqa", "*", 3.0), ("gqa", "lse", 4.0)]
    for op, output, value in rows:
        monkeypatch.setitem(TABLE, (op, "float32", output), (Tolerance(value, 0), "made up"))

    assert tolerance_for(*asked).atol == bound


def test_a_dtype_without_a_row_lists_those_that_have_one() -> None:
    with pytest.raises(ValueError, match="'float12' has no tolerance") as caught:
        tolerance_for("gemm", "float12", "C")

    assert "bfloat16, bool, float16" in str(caught.value)


def test_one_number_stands_for_both() -> None:
    assert tolerance_of(0.25) == Tolerance(0.25, 0.25)
    with pytest.raises(ValueError, match="atol = -1, but should be"):
        tolerance_of(-1)


def test_two_truths_may_differ_by_the_looser_of_each() -> None:
    assert looser(Tolerance(1, 2, 0.9), Tolerance(2, 1)) == Tolerance(2, 2, 0.9)


def test_a_calibrated_row_is_that_of_its_truth_alone() -> None:
    row = tolerance_for("gemm", "float16", "C", "torch on cpu")

    assert row.atol < tolerance_for("gemm", "float16", "C").atol
    assert row.row_norm is not None
    assert tolerance_for("gemm", "float16", "C", "nobody on cuda") == tolerance_for("gemm", "float16", "C")


def test_rows_stay_bounded_only_where_both_truths_bound_them() -> None:
    assert looser(Tolerance(1, 1, row_norm=0.1), Tolerance(1, 1, row_norm=0.2)).row_norm == 0.2
    assert looser(Tolerance(1, 1, row_norm=0.1), Tolerance(1, 1)).row_norm is None


def test_a_row_norm_that_bounds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="row_norm = inf, but should be"):
        Tolerance(1, 1, row_norm=math.inf)

"""The same code in float64 and in a narrow dtype: what it rounds, what it chooses, and what it writes in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refgrid.proving.precision import chosen_by, in_dtype, in_float32, in_float64

A = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
INPUTS = {"x": A, "n": 3}


def test_in_float64_no_cast_rounds() -> None:
    def call(given: Mapping[str, Any]) -> Any:
        x = given["x"].float() / given["n"]
        stored = torch.zeros(5, 7, dtype=torch.bfloat16)
        stored[:] = x.bfloat16()
        return stored.to(torch.float16).sum(dtype=torch.float32)

    result = in_float64(call, INPUTS)

    assert result.dtype == torch.float64
    assert result == (A.double() / 3).sum()
    assert torch.get_default_dtype() == torch.float32


def test_in_float64_bits_stay_bits() -> None:
    inputs = {"x": A.to(torch.float8_e4m3fn)}

    result = in_float64(lambda given: given["x"].view(torch.uint8).clone(), inputs)

    assert torch.equal(result, inputs["x"].view(torch.uint8))


def test_in_float32_what_is_rounded_to_16_bits_is_not() -> None:
    result = in_float32(lambda given: (given["x"].float() / 3).to(torch.bfloat16).to(given["x"].dtype), INPUTS)

    assert result.dtype == torch.float32
    assert torch.equal(result, A.float() / 3)


def test_of_choices_the_numbers_are_known() -> None:
    indices, (best, ordered) = chosen_by(lambda: (A.float().topk(2, dim=1).indices, A.float().sort(dim=1))[0])

    assert torch.equal(best, A.float().gather(1, indices))
    assert torch.equal(ordered, A.float().sort(dim=1).values)


def test_in_a_dtype_each_step_is_rounded() -> None:
    result = in_dtype(lambda given: given["x"].float() / 3 * 3, INPUTS, torch.bfloat16)

    assert result.dtype == torch.float32
    assert torch.equal(result, ((A / 3) * 3).float())


def test_in_a_dtype_what_is_written_in_place_is_rounded_in_place() -> None:
    def call(given: Mapping[str, Any]) -> Any:
        x = given["x"].float()
        row = x[0]
        row.mul_(1 / 3)
        return x

    result = in_dtype(call, INPUTS, torch.bfloat16)

    assert torch.equal(result[0], (A[0].float() / 3).bfloat16().float())
    assert torch.equal(result[1:], A[1:].float())


def test_a_matrix_product_is_summed_in_float32_and_rounded_once() -> None:
    b = torch.randn(7, 4, generator=torch.Generator().manual_seed(1)).bfloat16()

    result = in_dtype(lambda given: given["x"].float() @ b.float(), INPUTS, torch.bfloat16)

    assert torch.equal(result, (A.float() @ b.float()).bfloat16().float())


def test_choices_are_those_of_float32() -> None:
    x = torch.tensor([[1.0, 1.001, 0.5], [2.0, 2.001, 3.0]])  # 1 and 1.001 are one bfloat16

    def call(given: Mapping[str, Any]) -> Any:
        return (given["x"] * 1.0).topk(1, dim=1)

    value, index = in_dtype(call, {"x": x}, torch.bfloat16)

    assert index.tolist() == [[1], [2]]
    assert value.tolist() == [[1.0], [3.0]]


def test_float32_is_the_code_as_it_stands() -> None:
    assert torch.equal(in_dtype(lambda given: given["x"].float() / 3, INPUTS, torch.float32), A.float() / 3)

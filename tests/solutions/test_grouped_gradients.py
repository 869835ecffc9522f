"""What would be wrong with gradients by PyTorch's kernel, by which torch and fa3 go backward, is seen by the checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grouped_checks import CHECKS
from grouped_layouts import Subject, layouts
from varlen_kernels import backends_of_a_gpu

from refgrid_solutions.grouped_attention.backends import aten, fa3
from refgrid_solutions.grouped_attention.predicted import CALLS, COPIES

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = layouts(8)
WAYS = {"torch by copies": ("torch", COPIES), "torch by calls": ("torch", CALLS), "fa3": ("fa3", COPIES)}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with backends_of_a_gpu(monkeypatch):
        yield


@pytest.mark.parametrize("layout", ["same keys", "sixteen prefixes", "masks interleaved"])
@pytest.mark.parametrize("way", WAYS)
def test_sums_over_slices_in_the_tensors_dtype_are_seen(way: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, predicted = WAYS[way]
    for module in (aten, fa3):
        monkeypatch.setattr(module, "faster_way", lambda _: predicted)
    monkeypatch.setattr(aten, "_SUMMED_IN", torch.bfloat16)

    with pytest.raises(AssertionError, match="dk is off by"):
        CHECKS["summed in float32"](LAYOUTS[layout], Subject(backend, head_dim=16))


@pytest.mark.parametrize("backend", ["torch", "fa3"])
def test_one_bit_of_a_sum_over_slices_told_in_another_order_is_seen(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    true: Any = aten.gradients

    def faulty(tensors: Any, plan: Any, *told: Any) -> Any:
        dq, dk, dv = true(tensors, plan, *told)
        return dq, dk * (1 + 2**-7 * (plan.slices[0].q_start > 0)), dv

    monkeypatch.setattr(aten, "gradients", faulty)

    with pytest.raises(AssertionError, match="dk has other bits"):
        CHECKS["gradients in another order"](LAYOUTS["same keys"], Subject(backend, head_dim=16))

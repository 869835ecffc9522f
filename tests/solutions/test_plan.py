"""The plan: one copy to the device, what crosses into a custom op, and how much work it is."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from grouped_layouts import Subject
from grouped_planning import check_planning

from refgrid_solutions.grouped_attention import CAUSAL, FULL, GroupedAttnPlan, plan_grouped_attn
from refgrid_solutions.grouped_attention.plan import device_ints, rebuilt

SIZES: dict[str, Any] = {
    "total_q": 8,
    "total_k": 9,
    "num_heads_q": 4,
    "num_heads_k": 2,
    "head_dim": 64,
    "dtype": torch.bfloat16,
    "device": "cpu",
}


def planned(**changes: Any) -> GroupedAttnPlan:
    return plan_grouped_attn([(0, 4), (6, 8)], [(0, 9), (3, 5)], [CAUSAL, FULL], **{**SIZES, **changes})


def test_ranges_may_be_tensors() -> None:
    told = torch.tensor([[0, 4], [6, 8]]), torch.tensor([[0, 9], [3, 5]], dtype=torch.int32), torch.tensor([1, 0])

    assert plan_grouped_attn(*told, **SIZES).slices == planned().slices == ((0, 4, 0, 9, 1), (6, 8, 3, 5, 0))


def test_a_range_tensor_of_floats_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("q_ranges[0] = [0.0, 4.0] is no pair of integers")):
        plan_grouped_attn(torch.tensor([[0.0, 4.0]]), [(0, 9)], [0], **SIZES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads_k": 3}, "num_heads_k = 3 does not divide num_heads_q = 4"),
        ({"total_q": 7}, "q_ranges[1] = (6, 8) is out of bounds"),
        ({"max_splits": 0}, "max_splits = 0, but should be an integer from 1"),
        ({"deterministic": "yes"}, "deterministic = 'yes', but should be True or False"),
        ({"deterministic": None}, "deterministic = None, but should be True or False"),
        ({"backward": 1}, "backward = 1, but should be True or False"),
        ({"dtype": torch.int8}, "no backend can run this"),
    ],
)
def test_what_cannot_be_planned_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        planned(**changes)


def test_a_backend_that_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match="backend = 'cuda' cannot run this plan: it is not written yet"):
        planned().prepare("cuda")


def test_an_unknown_backend_is_told_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"backend = 'fa9', but should be auto or one of: .*reference"):
        planned().prepare("fa9")


def test_flops_count_visible_pairs_only() -> None:
    plan = planned()

    assert plan.forward_flops == 4 * 64 * 4 * (6 + 7 + 8 + 9 + 2 * 2)
    assert plan.backward_flops == 2.5 * plan.forward_flops


@pytest.mark.parametrize("max_splits", [None, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_plan_made_again_inside_an_op_says_the_same(deterministic: bool, max_splits: int | None) -> None:
    plan = planned(deterministic=deterministic, max_splits=max_splits)
    q, k = torch.empty(8, 4, 64, dtype=torch.bfloat16), torch.empty(9, 2, 64, dtype=torch.bfloat16)

    again = rebuilt(q, k, plan.host, "reference", plan.metadata("reference"))

    for name in ("total_q", "total_k", "num_heads_q", "num_heads_k", "head_dim", "dtype", "device", "slices"):
        assert getattr(again, name) == getattr(plan, name)
    assert (again.deterministic, again.max_splits) == (deterministic, max_splits)


def test_a_plan_of_nothing_made_again_is_of_nothing() -> None:
    plan = plan_grouped_attn([], [], [], **SIZES)
    q, k = torch.empty(8, 4, 64, dtype=torch.bfloat16), torch.empty(9, 2, 64, dtype=torch.bfloat16)

    again = rebuilt(q, k, plan.host, "reference", [])

    assert (again.slices, again.seeing, again.forward_flops) == ((), [], 0)


def test_device_integers_are_aligned_parts_of_one_tensor() -> None:
    lists: Any = ([1, 2, 3, 4, 5], [], [[6, 7, 8], [9, 10, 11]], [12])
    parts = device_ints(torch.device("cpu"), *(np.array(part, np.int32).data for part in lists))

    assert [part.tolist() for part in parts] == [*lists]
    assert all(part.is_contiguous() for part in parts)
    assert {part.untyped_storage().data_ptr() for part in parts} == {parts[0].data_ptr()}
    assert all((part.data_ptr() - parts[0].data_ptr()) % 16 == 0 and part.dtype == torch.int32 for part in parts)


def test_many_groups_are_no_more_operations_than_few() -> None:
    check_planning(Subject("reference"))

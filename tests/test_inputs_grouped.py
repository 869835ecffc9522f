"""Inputs of grouped attention: slices that are legal and hostile, and keys that show when they are read."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import naive_grouped as naive
import pytest
import torch

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import DataSet, DefinitionError, Workload, load_dataset
from refgrid.proving.inputs import make_inputs
from refgrid.proving.inputs.grouped import UNSEEN, seen_keys

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "definitions/gqa_grouped").glob("*.json"))
NAME = "gqa_grouped_h32_kv8_d64"
SHAPED = ("q_ranges", "k_ranges", "mask_types")


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


def made(dataset: DataSet, workload: Workload, seed: int = 0, name: str = NAME) -> dict[str, Any]:
    return dict(make_inputs(dataset.definitions[name], workload, seed, "cpu", ROOT).tensors)


def of(dataset: DataSet, uuid: str, slices: int, total_q: int, total_k: int) -> Workload:
    """A workload of another name and other sizes."""
    axes = {"num_slices": slices, "total_q": total_q, "total_k": total_k}
    return dataclasses.replace(dataset.workloads[NAME][0], uuid=uuid, axes=axes)


def entries(inputs: dict[str, Any]) -> list[naive.Entry]:
    return [(*q, *k, mask) for q, k, mask in zip(*(inputs[name].tolist() for name in SHAPED), strict=True)]


def small(dataset: DataSet, name: str) -> list[tuple[str, dict[str, Any]]]:
    chosen = [each for each in dataset.workloads[name] if size_of(dataset.definitions[name], each) == "small"]
    return [(each.uuid, made(dataset, each, name=name)) for each in chosen]


@pytest.mark.parametrize("name", NAMES)
def test_a_key_that_no_query_sees_is_large_and_all_others_are_numbers(dataset: DataSet, name: str) -> None:
    hostile = 0
    for uuid, inputs in small(dataset, name):
        seen = naive.dense_mask(entries(inputs), len(inputs["q"]), len(inputs["k"])).any(0)
        for keys in ("k", "v"):
            is_large = inputs[keys].abs().float() > UNSEEN * 0.99
            assert torch.equal(is_large.all(-1).all(-1), ~seen), (uuid, keys)
            assert inputs[keys].isfinite().all()
            assert not is_large[seen].any(), (uuid, keys)
        hostile += int((~seen).sum())
    assert hostile > 50


def test_the_builder_sees_the_same_keys_as_the_definition() -> None:
    ranges = torch.tensor([[0, 2], [4, 4]]), torch.tensor([[3, 5], [0, 6]])

    assert seen_keys(*ranges, total_k=7).tolist() == [False, False, False, True, True, False, False], (
        "keys of a slice without queries are nobody's"
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_definition_has_the_slices_that_find_faults(dataset: DataSet, name: str) -> None:
    found = small(dataset, name)
    lists = [entries(inputs) for _, inputs in found]
    pieces = [entry for each in lists for entry in each]
    pairs = [(one, other) for each in lists for one in each for other in each if one is not other]

    assert len(found) >= 8
    assert sum(each.uuid.startswith("edge_") for each in dataset.workloads[name]) >= 8
    assert any(one[2] < other[2] < one[3] < other[3] for one, other in pairs), "keys that overlap"
    assert any(one[2:4] == other[2:4] for one, other in pairs), "keys that are shared whole"
    assert any(q0 == q1 and k0 < k1 for q0, q1, k0, k1, _ in pieces), "a slice without queries"
    assert any(q0 < q1 and k0 == k1 for q0, q1, k0, k1, _ in pieces), "a slice without keys"
    assert any(mask and q1 - q0 > k1 - k0 > 0 for q0, q1, k0, k1, mask in pieces), "more queries than keys"
    assert any(mask and 1 < q1 - q0 < k1 - k0 for q0, q1, k0, k1, mask in pieces), "causal, and to be seen as such"
    assert any(not mask and q1 - q0 > 1 < k1 - k0 for q0, q1, k0, k1, mask in pieces), "full, likewise"
    assert any(len(each) == 64 for each in lists)
    assert any(each != sorted(each) for each in lists), "no order"
    assert any(k0 % 8 and q0 % 8 for q0, _, k0, *_ in pieces), "starts of no tile"
    assert any(_left_over(inputs) for _, inputs in found), "queries in no slice"


def _left_over(inputs: dict[str, Any]) -> int:
    in_slices = sum(q1 - q0 for q0, q1, *_ in entries(inputs))
    return len(inputs["q"]) - in_slices


@pytest.mark.parametrize("kind", ["g5", "singles", "shared", "lopsided", "blind"])
def test_what_is_drawn_is_legal_at_any_seed(dataset: DataSet, kind: str) -> None:
    for seed, (slices, total_q, total_k) in enumerate(
        [(1, 1, 1), (5, 17, 67), (3, 200, 40), (16, 16, 15), (7, 30, 0)] * 4
    ):
        entries(made(dataset, of(dataset, f"{kind}_{seed}", slices, total_q, total_k), seed))  # obeys the constraints


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("all(0 <= a <= b <= total_q - 9 for a, b in q_ranges.tolist())", "total_q - 9"),
        ("(q_ranges.sort(0).values[1:, 0] > 1 + q_ranges.sort(0).values[:-1, 1]).all()", "does not hold"),
    ],
)
def test_a_constraint_on_ranges_is_demanded(dataset: DataSet, broken: str, words: str) -> None:
    definition = dataclasses.replace(dataset.definitions[NAME], constraints=(broken,))

    with pytest.raises(DefinitionError, match=re.escape(words)):
        make_inputs(definition, of(dataset, "g9", 9, 30, 60), 0, "cpu", ROOT)


@pytest.mark.parametrize(
    ("q_ranges", "holds"),
    [([[0, 3], [5, 7], [3, 5]], True), ([[0, 4], [2, 2], [4, 7]], True), ([[0, 4], [3, 7]], False), ([], True)],
    ids=str,
)
def test_the_definition_forbids_a_query_in_two_slices(dataset: DataSet, q_ranges: list[list[int]], holds: bool) -> None:
    from refgrid.dataset.constraint import Constraint

    text = next(each for each in dataset.definitions[NAME].constraints if "sort" in each)

    fault = Constraint(text).fault({"q_ranges": torch.tensor(q_ranges, dtype=torch.int32).reshape(-1, 2)})

    assert (fault == "") == holds


@pytest.mark.parametrize("rank", range(4))
def test_zigzag_is_causal_attention_of_whole_sequences(dataset: DataSet, rank: int) -> None:
    world, total_k = 4, 160
    inputs = made(dataset, of(dataset, f"zigzag_w{world}_r{rank}_b3", 6, total_k // world, total_k))
    found = sorted(entries(inputs))
    early, late = found[::2], found[1::2]

    for (q0, q1, k0, k1, _), (q2, q3, k2, k3, _), after in zip(early, late, [*early[1:], None], strict=True):
        chunk = q1 - q0
        assert (q2, q3 - q2, k2) == (q1, chunk, k0), "two chunks side by side, of one sequence"
        assert (k1 - k0, k3 - k2) == ((rank + 1) * chunk, (2 * world - rank) * chunk)
        assert (after[2] if after else total_k) == k0 + 2 * world * chunk, "the next sequence follows"
    assert {mask for *_, mask in found} == {1}


@pytest.mark.parametrize("sizes", [(2, 10, 41), (3, 10, 40), (2, 11, 40)])
def test_a_zigzag_that_does_not_divide_is_named(dataset: DataSet, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(DefinitionError, match=r"rank 1 of 4 ranks needs two slices a sequence, and 4 times as many"):
        made(dataset, of(dataset, "zigzag_w4_r1", *sizes))


def test_a_rank_is_of_the_world_and_one_beyond_or_none_is_named(dataset: DataSet) -> None:
    with pytest.raises(DefinitionError, match="rank 4 of 4 ranks"):
        made(dataset, of(dataset, "zigzag_w4_r4", 2, 10, 40))
    assert entries(made(dataset, of(dataset, "zigzag_w4_last", 2, 10, 40)))[0][3] in (20, 25)
    with pytest.raises(DefinitionError, match="names its world size and its rank"):
        made(dataset, of(dataset, "zigzag_w4", 2, 10, 40))


def test_singles_need_a_query_each(dataset: DataSet) -> None:
    with pytest.raises(DefinitionError, match="5 slices of a query each need as many queries, but total_q is 4"):
        made(dataset, of(dataset, "singles", 5, 4, 40))


def test_serving_sizes_leave_no_query_of_a_slice_without_keys(dataset: DataSet) -> None:
    """Where a library defines nothing for such a query, it proves nothing of a workload that has one."""
    for name in NAMES:
        for uuid, inputs in small(dataset, name):
            blind = [(mask and q1 - q0 > k1 - k0) or (q1 > q0 and k0 == k1) for q0, q1, k0, k1, mask in entries(inputs)]
            assert any(blind) == ("blind" in uuid), uuid


def test_the_three_parts_of_a_slice_are_of_one_draw_and_another_seed_has_others(dataset: DataSet) -> None:
    workload = of(dataset, "g5", 5, 40, 90)

    assert entries(made(dataset, workload)) == entries(made(dataset, workload))
    assert entries(made(dataset, workload)) != entries(made(dataset, workload, seed=1))

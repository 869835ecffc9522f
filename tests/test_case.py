"""The plan: which cases there are, what they are called, and that nothing falls out silently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refgrid.dataset.case import Case, Selection, op_of, plan
from refgrid.dataset.definition import load_dataset


def _ids(tmp_path: Path, sources: dict[str, list[str]], **selection: Any) -> list[str]:
    return [case.id for case in plan(load_dataset(tmp_path), sources, Selection(**selection))]


def test_each_workload_is_held_against_every_source(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    write_definition(double, 2)

    assert _ids(tmp_path, {"double": ["numpy", "torch"]}) == [
        "double_n4-b2-shape",
        "double_n4-b2-dtype",
        "double_n4-b2-numpy",
        "double_n4-b2-torch",
        "double_n4-b2-agreement",
        "double_n4-b2-determinism",
    ]


def test_seeds_multiply_cases_whose_names_stay(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> None:
    write_definition(double, 2)
    write_definition("{", name="broken")
    once = _ids(tmp_path, {"double": ["torch"]})
    cases = plan(load_dataset(tmp_path), {"double": ["torch"]}, Selection(seeds=range(3)))

    assert [case.id for case in cases] == [*once, *(f"{name}-seed{seed}" for seed in (1, 2) for name in once)]
    assert [case.name for case in cases] == once * 3
    assert len({case.id for case in cases}) == len(cases)


def test_one_source_has_nobody_to_agree_with(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> None:
    write_definition(double, 2)

    assert "double_n4-b2-agreement" not in _ids(tmp_path, {"double": ["torch"]})


def test_an_op_without_a_source_still_owes_its_numerics(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    write_definition(double, 2)

    assert "double_n4-b2-numerics" in _ids(tmp_path, {})


def test_a_broken_file_and_a_definition_without_workloads_are_cases(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    write_definition(double)
    write_definition("{", name="broken")

    assert _ids(tmp_path, {"double": ["torch"]}) == ["broken-definition", "double_n4-definition"]


def test_sizes_follow_the_bytes_that_grow(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> None:
    double["axes"]["n"]["value"] = 1024
    write_definition(double, 1, 128, 129, 2**15, 2**15 + 1)
    cases = plan(load_dataset(tmp_path), {"double": ["torch"]}, Selection())

    sizes = {case.workload: case.size for case in cases}

    assert list(sizes.values()) == ["small", "small", "medium", "medium", "large"]


def test_a_few_rows_are_small_however_long_a_row_is(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    double["axes"]["n"]["value"] = 2**20
    write_definition(double, 8, 9, 256, 257)
    cases = plan(load_dataset(tmp_path), {"double": ["torch"]}, Selection())

    assert list({case.workload: case.size for case in cases}.values()) == ["small", "medium", "medium", "large"]


@pytest.mark.parametrize(
    ("selection", "legal"),
    [
        pytest.param({"op_types": ("gemm",)}, "--op-type 'gemm' is not known; legal values: double", id="op_type"),
        pytest.param({"definitions": ("double_n5",)}, "'double_n5' is not known; legal values: double_n4", id="name"),
        pytest.param({"sizes": ("tiny",)}, "'tiny' is not known; legal values: large, medium, small", id="size"),
    ],
)
def test_an_unknown_selection_lists_the_legal_values(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, selection: dict[str, Any], legal: str
) -> None:
    write_definition(double, 1)

    with pytest.raises(ValueError, match="is not known") as caught:
        _ids(tmp_path, {}, **selection)

    assert legal in str(caught.value)


def test_the_op_is_the_longest_known_beginning_of_the_name(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    write_definition(double, 1)
    definition = load_dataset(tmp_path).definitions["double_n4"]

    assert op_of(definition, ["dou", "double", "double_n"]) == "double"
    assert op_of(definition, ["double", "double_n4"]) == "double_n4"
    assert op_of(definition, []) == "double"


def test_a_case_has_one_name() -> None:
    assert Case("gemm_n1_k1", "gemm", "gemm", "m7", "numerics", "torch").id == "gemm_n1_k1-m7-torch"
    assert Case("gemm_n1_k1", "gemm", "gemm", "m7", "shape").id == "gemm_n1_k1-m7-shape"
    assert Case("gemm_n1_k1", "gemm", "gemm", "edge_m1", "shape").edge

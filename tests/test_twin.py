"""Twins: the same op and reference with smaller constants, where the weights are too large for many machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from refgrid.dataset.case import Case, Selection, definition_of, plan, size_of
from refgrid.dataset.constraint import Constraint
from refgrid.dataset.definition import (
    Axis,
    DataSet,
    Definition,
    DefinitionError,
    DType,
    InputSpec,
    TensorSpec,
    Workload,
    load_dataset,
)
from refgrid.dataset.memory import weight_bytes
from refgrid.dataset.smaller import TWIN_ABOVE, TWIN_BYTES, changes, constants, twin_of

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = {"num_experts": 256, "num_local_experts": 32, "hidden": 7168, "inner": 2048, "gemm1_out": 4096}
BLOCKS = {"hidden_blocks": 56, "inner_blocks": 16, "gemm1_out_blocks": 32}
RELATED = (
    *("gemm1_out == 2 * inner", "hidden == 128 * hidden_blocks", "inner == 128 * inner_blocks"),
    *("gemm1_out == 128 * gemm1_out_blocks", "num_experts % 8 == 0", "num_local_experts <= num_experts"),
)


def experts(*constraints: str, **other: int) -> Definition:
    """A mixture of experts in fp8, 1.3 GiB of weights with their scales."""
    sizes = {**EXPERTS, **BLOCKS, **other}
    axes = {"tokens": Axis("var"), **{name: Axis("const", value) for name, value in sizes.items()}}
    weight: DType = "float8_e4m3fn"
    scale: DType = "float32"
    inputs = {
        "logits": TensorSpec(("tokens", "num_experts"), "float32"),
        "bias": TensorSpec(("num_experts",), "bfloat16"),
        "x": TensorSpec(("tokens", "hidden"), weight),
        "w1": TensorSpec(("num_local_experts", "gemm1_out", "hidden"), weight),
        "s1": TensorSpec(("num_local_experts", "gemm1_out_blocks", "hidden_blocks"), scale),
        "w2": TensorSpec(("num_local_experts", "hidden", "inner"), weight),
        "s2": TensorSpec(("num_local_experts", "hidden_blocks", "inner_blocks"), scale),
        "offset": TensorSpec(None, "int32"),
    }
    outputs = {"y": TensorSpec(("tokens", "hidden"), "bfloat16")}
    return Definition("experts_e32", "moe", axes, inputs, outputs, "REFERENCE", (*RELATED, *constraints))


def workload(offset: int) -> Workload:
    given = dict.fromkeys(experts().inputs, InputSpec("random"))
    return Workload(f"o{offset}", {"tokens": 4}, {**given, "offset": InputSpec("scalar", offset)})


def twin(made: Definition, *workloads: Workload) -> Definition:
    found = twin_of(made, workloads)
    assert found is not None
    return found


def holds(made: Definition, each: Workload) -> bool:
    """Whether all constraints hold that a workload decides without any tensor."""
    scalars = {name: spec.value for name, spec in each.inputs.items() if spec.type == "scalar"}
    known = {**made.axis_values(each.axes), **scalars}
    texts = (text for text in made.constraints if set(Constraint(text).names) <= set(known))
    return not any(Constraint(text).fault(known) for text in texts)


class TestDerived:
    def test_it_is_the_same_op_with_small_weights(self) -> None:
        made = experts()
        found = twin(made)

        assert weight_bytes(found) <= TWIN_BYTES < TWIN_ABOVE < weight_bytes(made)
        assert replace(found, name=made.name, axes=made.axes) == made
        assert found.name == "experts_e32~twin"

    def test_related_constants_stay_related_and_what_is_in_no_large_weight_stays(self) -> None:
        found = twin(experts())
        sizes = constants(found)

        assert holds(found, workload(0))
        assert sizes["num_experts"] == 256  # in the bias alone
        assert all(EXPERTS[name] % sizes[name] == 0 for name in EXPERTS)
        assert sizes["hidden"] < 7168
        assert sizes["hidden"] % 128 == 0

    def test_no_axis_is_worn_down_alone(self) -> None:
        shares = [before // after for before, after in changes(EXPERTS, constants(twin(experts()))).values()]

        assert max(shares) <= 2 * min(shares)

    def test_constraints_on_scalars_hold_with_those_of_every_workload(self) -> None:
        made = experts("offset < num_local_experts")

        assert constants(twin(made, workload(0)))["num_local_experts"] < 32
        assert constants(twin(made, workload(0), workload(31)))["num_local_experts"] == 32

    def test_small_weights_need_none(self) -> None:
        assert twin_of(experts(num_local_experts=4), ()) is None

    def test_constants_that_cannot_shrink_are_an_error_of_the_definition(self) -> None:
        made = experts("num_local_experts * hidden * inner == 32 * 7168 * 2048")

        with pytest.raises(DefinitionError, match=r"leave no twin of 32\.0 MiB") as caught:
            twin_of(made, ())

        assert str(caught.value).startswith("experts_e32.json: constraints: ")


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


class TestOfThisDataSet:
    def test_every_twin_obeys_its_constraints_at_every_workload(self, dataset: DataSet) -> None:
        found = {name: twin_of(made, dataset.workloads[name]) for name, made in dataset.definitions.items()}
        twins = {name: made for name, made in found.items() if made}

        assert twins
        assert {name for name, made in dataset.definitions.items() if weight_bytes(made) > TWIN_ABOVE} == set(twins)
        for name, made in twins.items():
            assert weight_bytes(made) <= TWIN_BYTES, name
            assert [each.uuid for each in dataset.workloads[name] if not holds(made, each)] == []

    def test_a_bound_below_a_gemm_gives_it_one(self, dataset: DataSet) -> None:
        made = dataset.definitions["gemm_n57344_k8192"]
        assert twin_of(made, ()) is None

        found = twin_of(made, (), above=2**28)
        assert found is not None
        sizes = constants(found)

        assert (57344 % sizes["N"], 8192 % sizes["K"]) == (0, 0)
        assert 2 * sizes["N"] * sizes["K"] <= TWIN_BYTES

    def test_a_smaller_twin_is_made_where_it_is_asked_for(self, dataset: DataSet) -> None:
        made = dataset.definitions["gemm_n128_k2048"]
        found = twin_of(made, (), above=2**18, most=2**17)

        assert found is not None
        assert weight_bytes(found) <= 2**17 < weight_bytes(made)


class TestPlanned:
    @pytest.fixture
    def cases(self, double: dict[str, Any], write_definition: Any, tmp_path: Path) -> tuple[DataSet, list[Case]]:
        """`double` with a weight of 2 GiB."""
        double["axes"] |= {"rows": {"type": "const", "value": 2**15}, "columns": {"type": "const", "value": 2**14}}
        double["inputs"]["w"] = {"shape": ["rows", "columns"], "dtype": "float32"}
        double["reference"] = "def run(x, w):\n    return x * 2\n"
        write_definition(double)
        each = {"uuid": "b2", "axes": {"batch_size": 2}, "inputs": {"x": {"type": "random"}, "w": {"type": "random"}}}
        line = json.dumps({"definition": "double_n4", "workload": each})
        (tmp_path / "workloads" / "double" / "double_n4.jsonl").write_text(line)
        dataset = load_dataset(tmp_path)
        return dataset, plan(dataset, {"double": ["torch"]}, Selection())

    def test_a_twin_has_the_cases_of_its_definition_after_them(self, cases: tuple[DataSet, list[Case]]) -> None:
        checks = ("shape", "dtype", "torch", "determinism")

        assert [case.id for case in cases[1]] == [
            *(f"double_n4-b2-{check}" for check in checks),
            *(f"double_n4~twin-b2-{check}" for check in checks),
        ]

    def test_its_cases_say_how_it_differs_and_belong_to_the_definition(self, cases: tuple[DataSet, list[Case]]) -> None:
        own, of_twin = cases[1][:4], cases[1][4:]

        assert {case.definition for case in cases[1]} == {"double_n4"}
        assert {case.twin for case in own} == {""}
        assert {case.twin for case in of_twin} == {"rows 32768 -> 4096, columns 16384 -> 2048"}

    def test_what_a_case_is_of_is_looked_up_in_one_place(self, cases: tuple[DataSet, list[Case]]) -> None:
        dataset, (own, *_, of_twin) = cases

        assert definition_of(dataset, own) is dataset.definitions["double_n4"]
        assert constants(definition_of(dataset, of_twin)) == {"n": 4, "rows": 4096, "columns": 2048}

    def test_its_size_is_its_own(self) -> None:
        made = experts()
        grown = replace(workload(0), axes={"tokens": 150})

        assert (size_of(made, grown), size_of(twin(made), grown)) == ("medium", "small")

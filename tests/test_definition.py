"""Reading definitions and workloads: every kind of broken file is named with its field and reason."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refgrid.dataset.definition import DefinitionError, load_dataset, read_definition

Damage = Callable[[dict[str, Any]], None]


def _set(*path: str, value: Any) -> Damage:
    def damage(definition: dict[str, Any]) -> None:
        at = definition
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "field", "reason"),
    [
        pytest.param(_set("inputs", "x", "dtype", value="f16"), "inputs.x.dtype", "found 'f16'", id="dtype"),
        pytest.param(_set("inputs", "x", "shape", value=["m"]), "inputs.x.shape", "'m' is unresolvable", id="axis"),
        pytest.param(_set("axes", "n", value={"type": "const"}), "axes.n", "a const axis has a value", id="const"),
        pytest.param(_set("axes", "n", value={"type": "exp"}), "axes.n.type", "'const' or 'var'", id="axis type"),
        pytest.param(_set("outputs", value={}), "outputs", "at least 1", id="no outputs"),
        pytest.param(
            _set("outputs", value={"x": {"shape": [], "dtype": "int8"}}), "outputs.x", "also an input", id="overlap"
        ),
        pytest.param(_set("reference", value="def run(x:"), "reference", "does not parse", id="syntax"),
        pytest.param(_set("reference", value="x = '\0'"), "reference", "does not parse", id="null byte"),
        pytest.param(_set("reference", value="def go(x): ..."), "reference", "no top-level function run", id="no run"),
        pytest.param(_set("reference", value="def run(z): ..."), "reference", "run takes ['z']", id="parameters"),
        pytest.param(_set("reference", value="def run(*x): ..."), "reference", "run takes []", id="variadic"),
        pytest.param(_set("name", value="other"), "name", "the file is called double_n4.json", id="name"),
        pytest.param(_set("op_type", value="other"), "op_type", "the folder is called double", id="op_type"),
        pytest.param(_set("constraints", value=["n ="]), "constraints.0", "no Python expression", id="constraint"),
    ],
)
def test_a_broken_definition_names_file_field_and_reason(
    double: dict[str, Any], write_definition: Any, damage: Damage, field: str, reason: str
) -> None:
    file = write_definition(double)
    damaged = copy.deepcopy(double)
    damage(damaged)
    file.write_text(json.dumps(damaged))

    with pytest.raises(DefinitionError) as caught:
        read_definition(file)

    assert caught.value.file == str(file)
    assert caught.value.field == field
    assert reason in caught.value.reason


def test_broken_json_stops_nobody_else(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> None:
    write_definition(double, 1, 2)
    write_definition('{"name": ', name="broken")

    dataset = load_dataset(tmp_path)

    assert list(dataset.definitions) == ["double_n4"]
    assert [(error.name, error.field) for error in dataset.broken] == [("broken", "file")]
    assert "Invalid JSON" in dataset.broken[0].reason


@pytest.mark.parametrize(
    ("line", "field"),
    [
        pytest.param('{"definition": "x"}', "line 1: workload", id="no workload"),
        pytest.param("{", "line 1: file", id="json"),
        pytest.param(
            '{"definition": "double_n4", "workload": {"uuid": "b", "axes": {}, "inputs": {"x": {"type": "random"}}}}',
            "line 1: workload.axes.batch_size",
            id="open axis",
        ),
        pytest.param(
            '{"definition": "double_n4", "workload": {"uuid": "b", "axes": {"batch_size": 1, "n": 4}, '
            '"inputs": {"x": {"type": "random"}}}}',
            "line 1: workload.axes.n",
            id="const axis bound",
        ),
        pytest.param(
            '{"definition": "double_n4", "workload": {"uuid": "b", "axes": {"batch_size": 1}, "inputs": {}}}',
            "line 1: workload.inputs",
            id="inputs",
        ),
    ],
)
def test_a_broken_workload_names_its_line(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, line: str, field: str
) -> None:
    write_definition(double)
    (tmp_path / "workloads" / "double" / "double_n4.jsonl").write_text(line + "\n")

    (error,) = load_dataset(tmp_path).broken

    assert error.field == field
    assert error.name == "double_n4"


def test_workloads_that_are_no_text_stop_nobody_else(
    double: dict[str, Any], write_definition: Any, tmp_path: Path
) -> None:
    write_definition(double, 1)
    write_definition({**double, "name": "double_n5"}, 1)
    (tmp_path / "workloads" / "double" / "double_n5.jsonl").write_bytes(b"\xff\xfe")

    dataset = load_dataset(tmp_path)

    assert list(dataset.definitions) == ["double_n4"]
    assert [(error.name, error.field) for error in dataset.broken] == [("double_n5", "file")]


def test_a_constant_whose_tag_is_no_literal_is_named(double: dict[str, Any], write_definition: Any) -> None:
    definition = read_definition(write_definition({**double, "tags": ["eps:tiny"]}))

    with pytest.raises(DefinitionError, match=r"tags: 'eps:tiny' should end in a Python literal"):
        definition.constant("eps")


def test_a_workload_name_stands_once(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> None:
    write_definition(double, 3, 3)

    (error,) = load_dataset(tmp_path).broken

    assert error.reason == "'b3' stands twice"


def test_a_folder_without_definitions_is_no_data_set(tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="no such folder"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("reference", "value"),
    [
        pytest.param("EPS = 1e-5\ndef run(x): ...", 1e-5, id="assigned"),
        pytest.param("def run(x):\n    return f(x, eps=1e-6)", 1e-6, id="passed by keyword"),
    ],
)
def test_a_hidden_constant_is_read_from_the_reference(
    double: dict[str, Any], write_definition: Any, reference: str, value: float
) -> None:
    definition = read_definition(write_definition({**double, "reference": reference}))

    assert definition.constant("eps") == value
    assert definition.constant("n") == 4
    with pytest.raises(DefinitionError, match="does not say top_k"):
        definition.constant("top_k")


def test_a_tagged_constant_is_not_taken_from_the_text_under_test(double: dict[str, Any], write_definition: Any) -> None:
    told = {**double, "tags": ["model:x", "eps:1e-06"], "reference": "EPS = 1e-1\ndef run(x): ..."}

    assert read_definition(write_definition(told)).constant("eps") == 1e-6


def test_shapes_follow_the_workload(double: dict[str, Any], write_definition: Any) -> None:
    double["inputs"]["scale"] = {"shape": None, "dtype": "float32"}
    double["reference"] = "def run(x, scale): ..."
    definition = read_definition(write_definition(double))
    axes = definition.axis_values({"batch_size": 3})

    assert definition.shape("y", axes) == (3, 4)
    assert definition.shape("scale", axes) is None
    with pytest.raises(DefinitionError, match="has no value"):
        definition.axis_values({})

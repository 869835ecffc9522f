"""The published definitions are what the references and their table say; the guards of the renderer fire."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.dataset.definition import Workload, load_dataset
from refgrid.dataset.render import RenderError, render, stale

ROOT = Path(__file__).parents[1]
PACKAGE = "refgrid_references"
PUBLISHED = {
    "rmsnorm": 15, "gemm": 32, "gqa_grouped": 3, "gqa_paged": 37, "gqa_ragged": 9, "mla_paged": 6, "mla_ragged": 2,
    "dsa_paged": 3, "gdn": 9, "mamba_ssu": 2, "moe": 19, "rope": 1, "sampling": 24,
}  # fmt: skip
PATHS = sorted((ROOT / "definitions").glob("*/*.json"))

MODULE = '''\
"""A module of references."""

import math  # not needed by double
import torch

# Two, said once.
FACTOR = 2
OTHER = math.pi


def double(x: torch.Tensor, *, shift: float) -> torch.Tensor:
    """Twice x, shifted."""
    return times(x) + shift


def unused() -> float:
    return OTHER


# A comment that belongs to times.
def times(x: torch.Tensor) -> torch.Tensor:
    return FACTOR * x
'''
TABLE = """\
[notes]
odd = "An odd {n}."

[[family]]
op = "double"
op_type = "toy"
name = "double_n{n}"
description = "Doubles, shift {shift}."
tags = "stage:toy"
constants = { shift = 0.5 }
sizes = [{ n = 4 }, { n = 3, shift = 1.5, note = "odd", tags = "tp:2" }]
axes = { b = "rows", n = { const = "columns" } }
inputs = { x = "float32 b n: some numbers" }
outputs = { y = "float32 b n" }
"""


def load(path: Path) -> dict[str, Any]:
    definition: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return definition


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one module and one family; its name is toy_references."""
    folder = tmp_path / "site" / "toy_references"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('rendering imports nothing')\n")
    (folder / "toy.py").write_text(MODULE)
    (folder / "toy.toml").write_text(TABLE)
    monkeypatch.syspath_prepend(str(folder.parent))
    return folder


# --- the published files ------------------------------------------------------------------------------------------


def test_definitions_on_disk_are_current() -> None:
    assert stale(PACKAGE, ROOT) == [], "run `nox -s render`"


def test_every_definition_and_workload_is_valid() -> None:
    data = load_dataset(ROOT)
    assert data.broken == ()
    assert Counter(d.op_type for d in data.definitions.values()) == PUBLISHED
    for name, workloads in data.workloads.items():
        assert any(w.uuid.startswith("edge_") for w in workloads), f"{name} has no edge sizes"
        assert len({_case_of(w) for w in workloads}) == len(workloads), f"{name} repeats a size"


def _case_of(workload: Workload) -> tuple[object, ...]:
    """Sizes, scalars, and the words of the uuid, which may ask for other inputs, such as ties."""
    words = re.sub(r"[0-9]+", "", workload.uuid.removeprefix("edge_"))
    scalars = tuple(spec.value for spec in workload.inputs.values())
    return (*sorted(workload.axes.items()), scalars, words)


def test_rendering_needs_neither_torch_nor_the_references_imported() -> None:
    code = (
        "import sys; from pathlib import Path; from refgrid.dataset.render import stale; "
        f"stale({PACKAGE!r}, Path({str(ROOT)!r})); "
        f"sys.exit(' '.join(name for name in ('torch', {PACKAGE!r}) if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", PATHS, ids=[path.stem for path in PATHS])
def test_the_reference_stands_alone(path: Path) -> None:
    definition = load(path)
    namespace: dict[str, Any] = {}
    exec(compile(definition["reference"], str(path), "exec"), namespace)
    run = ast.parse(definition["reference"]).body[-1]
    assert isinstance(run, ast.FunctionDef)
    assert [argument.arg for argument in run.args.args] == list(definition["inputs"])
    imported = [node for node in ast.walk(ast.parse(definition["reference"])) if isinstance(node, ast.Import)]
    assert {alias.name for node in imported for alias in node.names} <= {"torch", "math"}
    outputs = namespace["run"](**smallest_inputs(definition))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for output, spec in zip(outputs, definition["outputs"].values(), strict=True):
        assert list(output.shape) == shape(definition, spec)
        assert output.dtype == getattr(torch, spec["dtype"])


# Few and small experts: those of a definition can be 64 GB.
EXPERTS = {
    "num_experts": 16,
    "num_local_experts": 16,
    "hidden_size": 256,
    "intermediate_size": 128,
    "gemm1_out_size": 256,
    "num_hidden_blocks": 2,
    "num_intermediate_blocks": 1,
    "num_gemm1_out_blocks": 2,
}


def shape(definition: dict[str, Any], spec: dict[str, Any]) -> list[int]:
    """Every var axis is 1, but an indptr has two entries; weights are cut down to keep this quick."""
    axes = {name: axis.get("value", 1) for name, axis in definition["axes"].items()} | {"len_indptr": 2, "N": 5, "K": 3}
    if definition["op_type"] == "moe":
        axes |= EXPERTS
    return [axes[axis] for axis in spec["shape"]]


def smallest_inputs(definition: dict[str, Any]) -> dict[str, Any]:
    """One sequence, one query, one page; index tensors by name."""
    inputs: dict[str, Any] = {}
    for name, spec in definition["inputs"].items():
        if spec["shape"] is None:
            inputs[name] = 0.5
        elif name.endswith("indptr"):
            inputs[name] = torch.tensor([0, 1], dtype=torch.int32)
        elif name == "kv_last_page_len":
            inputs[name] = torch.tensor([1], dtype=torch.int32)
        else:
            inputs[name] = torch.zeros(shape(definition, spec), dtype=getattr(torch, spec["dtype"]))
    return inputs


@pytest.mark.parametrize("name", [path.stem for path in PATHS if path.parent.name == "rmsnorm"])
def test_eps_is_a_literal_of_the_reference(name: str) -> None:
    definition = load(ROOT / "definitions" / "rmsnorm" / f"{name}.json")
    eps = "1e-05" if name.endswith("h4096") else "1e-06"
    assert f"eps={eps})" in definition["reference"].splitlines()[-1]
    assert f"eps = {eps}" in definition["description"]


@pytest.mark.parametrize(
    "path", [p for p in PATHS if p.stem.endswith("ps64") and "dsa" not in p.stem], ids=lambda path: path.stem
)
def test_each_sequence_has_one_last_page(path: Path) -> None:
    definition = load(path)
    assert definition["inputs"]["kv_last_page_len"]["shape"] == ["batch_size"]
    assert definition["axes"]["batch_size"]["type"] == "var"
    assert "len_indptr == batch_size + 1" in definition["constraints"]


# --- the renderer -------------------------------------------------------------------------------------------------


def test_rendering_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in render(PACKAGE, tmp_path)}
    again = {path.name: path.read_bytes() for path in render(PACKAGE, tmp_path)}
    assert first == again
    assert len(first) == len(PATHS)


@pytest.mark.usefixtures("toy")
def test_the_reference_holds_what_the_op_needs_and_no_more(tmp_path: Path) -> None:
    three, four = render("toy_references", tmp_path)
    assert (three.name, four.name) == ("double_n3.json", "double_n4.json")
    definition = load(three)
    assert definition["reference"] == (
        "import torch\n\n# Two, said once.\nFACTOR = 2\n\n\n"
        "def double(x: torch.Tensor, *, shift: float) -> torch.Tensor:\n"
        '    """Twice x, shifted."""\n    return times(x) + shift\n\n\n'
        "# A comment that belongs to times.\n"
        "def times(x: torch.Tensor) -> torch.Tensor:\n    return FACTOR * x\n\n\n"
        "@torch.no_grad()\ndef run(x):\n    return double(x, shift=1.5)\n"
    )
    assert definition["description"] == "Doubles, shift 1.5. An odd 3."
    assert definition["tags"] == ["stage:toy", "tp:2", "shift:1.5"]
    assert definition["inputs"] == {"x": {"shape": ["b", "n"], "dtype": "float32", "description": "some numbers"}}


def test_stale_names_what_differs_is_missing_and_is_left_over(toy: Path, tmp_path: Path) -> None:
    three, four = render("toy_references", tmp_path)
    assert stale("toy_references", tmp_path) == []
    shutil.copy(three, three.with_name("double_n5.json"))
    four.unlink()
    three.write_text(three.read_text().replace("shift=1.5", "shift=1.6"))
    assert stale("toy_references", tmp_path) == [
        "definitions/toy/double_n3.json: differs",
        "definitions/toy/double_n4.json: missing",
        "definitions/toy/double_n5.json: left over",
    ]
    (toy / "toy.py").write_text(MODULE.replace("FACTOR = 2", "FACTOR = 3"))
    three.with_name("double_n5.json").unlink()
    render("toy_references", tmp_path)
    assert stale("toy_references", tmp_path) == []
    assert "FACTOR = 3" in three.read_text()


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ('op = "double"\n', "", "op", "is missing"),
        ('op = "double"\n', 'op = "treble"\n', "op", "has no function treble"),
        ("{ n = 4 }", "{ m = 4 }", "sizes.n", "is None but should be a positive integer"),
        ("{ n = 4 }", "{ n = 4, m = 1 }", "sizes.m", "is neither a const axis nor"),
        ("{ n = 4 }", "{ n = true }", "sizes.n", "is True but should be"),
        ("{ n = 4 }", "{ n = 3 }", "sizes", "double_n3 stands twice"),
        ('note = "odd"', 'note = "even"', "sizes.note", "'even' is not in [notes]"),
        ("shift = 0.5", "shirt = 0.5", "op", "binds no shift"),
        ("constants = { shift = 0.5 }\n", "", "op", "binds no shift"),
        ('"float32 b n: some', '"float32 b k: some', "inputs.x", "unknown axis 'k'"),
        ('inputs = { x = "', 'inputs = { z = "', "op", "takes ['x', 'shift'] but the inputs are ['z']"),
        ('y = "float32 b n"', 'y = ": nothing"', "outputs.y", "names no dtype"),
        ("double_n{n}", "double_n{k}", "name", "'k'"),
        ('tags = "stage:toy"', "tags = 3", "tags", "is 3 but should be a str"),
        ("[[family]]", "[[families]]", "family", "holds no [[family]]"),
        ("[[family]]", "[[family]", "file", "line"),
    ],
)
def test_a_broken_row_is_an_error_that_names_it(
    toy: Path, tmp_path: Path, old: str, new: str, field: str, reason: str
) -> None:
    assert old in TABLE
    (toy / "toy.toml").write_text(TABLE.replace(old, new, 1))
    with pytest.raises(RenderError) as raised:
        render("toy_references", tmp_path)
    assert raised.value.field == field
    assert reason in raised.value.reason
    assert not (tmp_path / "definitions").exists(), "nothing is written when a row is broken"


def test_an_op_may_need_a_sibling_module(toy: Path, tmp_path: Path) -> None:
    module = MODULE.replace("FACTOR = 2", "from toy_references.two import scaled")
    (toy / "toy.py").write_text(module.replace("return FACTOR * x", "return scaled(x)"))
    (toy / "two.py").write_text(
        "import math\nimport torch\n\nTWO = math.sqrt(4)\n\n\ndef scaled(x):\n    return TWO * x\n"
    )
    text = load(render("toy_references", tmp_path)[0])["reference"]

    namespace: dict[str, Any] = {}
    exec(text, namespace)
    assert "toy_references" not in text
    assert text.index("def times") < text.index("def scaled") < text.index("def run")
    assert namespace["run"](torch.ones(1, 3)).tolist() == [[3.5] * 3]


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("from toy_references.two import FACTOR", "toy.py imports from two: No such file"),
        ("from toy_references import FACTOR", "should be 'from toy_references.<module> import <name>'"),
        ("from .other import FACTOR", "should be 'from toy_references.<module> import <name>'"),
        ("from toy_references.other import TWO as FACTOR", "should be 'from toy_references.<module> import <name>'"),
        ("import toy_references.other as FACTOR", "should be 'from toy_references.<module> import <name>'"),
        ("from toy_references.other import FACTOR", "needs two things called times: toy.py, other.py"),
    ],
)
def test_an_import_that_an_excerpt_cannot_follow_is_an_error(
    toy: Path, tmp_path: Path, statement: str, reason: str
) -> None:
    (toy / "toy.py").write_text(MODULE.replace("FACTOR = 2", statement))
    (toy / "other.py").write_text("import torch\n\ntimes = 3\nFACTOR = 2 * times\n")
    with pytest.raises(RenderError, match=re.escape(reason)):
        render("toy_references", tmp_path)


def test_a_table_without_its_module_is_an_error(toy: Path, tmp_path: Path) -> None:
    (toy / "toy.py").unlink()
    with pytest.raises(RenderError, match=r"toy\.toml: module: .*toy\.py"):
        render("toy_references", tmp_path)


def test_a_package_without_a_table_is_an_error(toy: Path, tmp_path: Path) -> None:
    (toy / "toy.toml").unlink()
    with pytest.raises(RenderError, match=r"holds no <module>\.toml"):
        render("toy_references", tmp_path)


def test_a_package_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RenderError, match="no_such_references: package: is not installed here"):
        render("no_such_references", tmp_path)

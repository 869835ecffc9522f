"""The key of a case: each part that changes gives another key and is named, and what does not count changes nothing."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import refgrid
from refgrid.caching.key import Keys, Machine, differing
from refgrid.caching.modules import Modules, _imports
from refgrid.dataset.case import Case, Selection, plan
from refgrid.dataset.definition import load_dataset
from refgrid.environments.measured import Environment
from refgrid.proving.expected import load_expected
from refgrid.sources import Sources
from refgrid_groundtruth import SOURCES as GROUND_TRUTH

GPU = Environment(
    "cu130", "cuda", "3.12.3", "linux x86_64", "2.11.0", "13.0", "13.0.88", "580.159.04", "NVIDIA H200", 1, {}
)
PROVIDER = """
from collections import namedtuple
SOURCES = (namedtuple("Source", "name library distribution ops")("sum", "torch", "torch", ("double",)),)

def adapter(source, op, device):
    raise NotImplementedError
"""
ORIGIN = """
import pathlib

class Origin:
    modules, apart, row = ("truths.double",), ("truths.table",), pathlib.Path(__file__ + ".row").read_text()

def origin(source, op):
    return Origin
"""
EXPECTED = """[[expected]]
cases = ["double_n4-b{}-sum"]
environments = ["*"]
verdict = "mismatch"
reason = "a reason of some length"
link = "https://example.org/1"
"""


class Checkout:
    """A data set, a package of ground truth, a lock and a copy of the instrument, all of which can be edited."""

    def __init__(self, root: Path, definition: dict[str, Any], write_definition: Any) -> None:
        self.root, self.definition, self._write = root, definition, write_definition
        self.machine = Machine(GPU, root / "lock.txt")
        self.tolerance, self.seed = "table", 0
        (root / "lock.txt").write_text("torch==2.11.0\n")
        (root / "ci").mkdir()
        self.define()
        self.truths(__init__=PROVIDER + ORIGIN, double="from truths import halves\n", halves="", table="")
        (root / "truths" / "__init__.py.row").write_text("row 1")
        (root / "installed" / "numpy-2.0.0.dist-info").mkdir(parents=True)
        shutil.copytree(Path(refgrid.__file__).parent, root / "refgrid", ignore=shutil.ignore_patterns("__pycache__"))

    def define(self, **changes: Any) -> None:
        self._write({**self.definition, **changes}, 1, 2)

    def truths(self, **modules: str) -> None:
        (self.root / "truths").mkdir(exist_ok=True)
        for name, text in modules.items():
            (self.root / "truths" / f"{name}.py").write_text(text)

    def parts(self, case: str = "double_n4-b1-sum") -> dict[str, str]:
        keys, cases = self.keys()
        return {**keys.run_parts, **keys.parts(cases[case], self.tolerance)}

    def key(self, case: str = "double_n4-b1-sum") -> str:
        keys, cases = self.keys()
        return keys.key(cases[case], self.tolerance)

    def keys(self) -> tuple[Keys, dict[str, Case]]:
        for name in [name for name in sys.modules if name.partition(".")[0] == "truths"]:
            del sys.modules[name]
        import truths  # type: ignore[import-not-found]

        dataset, sources = load_dataset(self.root), Sources((truths,))
        cases = plan(dataset, {"double": sources.serving("double")}, Selection(seeds=(self.seed,)))
        expected = load_expected(self.root / "ci" / "expected_failures.toml", GPU.name, GPU.device)
        return Keys(dataset, sources, expected, self.machine), {case.name: case for case in cases}


@pytest.fixture
def checkout(
    tmp_path: Path, double: dict[str, Any], write_definition: Any, monkeypatch: pytest.MonkeyPatch
) -> Checkout:
    made = Checkout(tmp_path, double, write_definition)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # a module edited within a second is read again
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(tmp_path / "installed"), *sys.path])
    found = Modules.of

    def of(package: str) -> Modules:
        return Modules(tmp_path / "refgrid" / "__init__.py", package) if package == "refgrid" else found(package)

    monkeypatch.setattr(Modules, "of", of)
    monkeypatch.setattr("refgrid.caching.modules._imports", imports_of_the_same_text)
    return made


_PARSED: dict[tuple[bytes, str], tuple[str, ...]] = {}


def imports_of_the_same_text(file: Path, package: str) -> Iterator[str]:
    """Parsed once for all tests: its text and its package tell what a module imports, so an edited one is parsed."""
    text = file.read_bytes(), package
    if text not in _PARSED:
        _PARSED[text] = tuple(_imports(file, package))
    return iter(_PARSED[text])


def environment(**changes: Any) -> Callable[[Checkout], None]:
    def change(checkout: Checkout) -> None:
        checkout.machine = replace(checkout.machine, environment=replace(GPU, **changes))

    return change


def edit(file: str, text: str = "# edited\n") -> Callable[[Checkout], None]:
    def change(checkout: Checkout) -> None:
        path = checkout.root / file
        assert path.exists() or not file.startswith("refgrid/"), f"{file} is not there: editing it would prove nothing"
        path.write_text((path.read_text() if path.exists() else "") + text)

    return change


def setting(name: str, value: Any) -> Callable[[Checkout], None]:
    return lambda checkout: setattr(checkout, name, value)


def other_workload(checkout: Checkout) -> None:
    file = checkout.root / "workloads" / "double" / "double_n4.jsonl"
    file.write_text(file.read_text().replace('"batch_size": 1', '"batch_size": 5'))


def less_memory(checkout: Checkout) -> None:
    checkout.machine = replace(checkout.machine, memory=2.0**31)


@dataclass(frozen=True)
class Change:
    """What is done to a checkout, and the words in which the difference is told."""

    told: str
    do: Callable[[Checkout], None]


CHANGES = [
    Change("definition", lambda checkout: checkout.define(tags=["eps:1e-5"])),
    Change("reference", lambda checkout: checkout.define(reference="def run(x):\n    return x + x\n")),
    Change("adapter", edit("truths/double.py")),
    Change("adapter", edit("truths/halves.py")),
    Change("adapter", edit("truths/__init__.py")),
    Change("adapter", edit("truths/__init__.py.row", " of another table")),
    Change("instrument", edit("refgrid/proving/proof.py")),
    Change("instrument", edit("refgrid/proving/compare.py")),
    Change("instrument", edit("refgrid/proving/inputs/plain.py")),
    Change("tolerances", edit("refgrid/proving/tolerance.py")),
    Change("tolerances", edit("refgrid/proving/tolerance.toml")),
    Change("tolerances", edit("refgrid/proving/tolerance.json")),
    Change("instrument", edit("refgrid/contract.py")),
    Change("instrument", edit("refgrid/plugin.py")),
    Change("lock", edit("lock.txt")),
    Change("python 3.12.3 -> 3.12.4", environment(python="3.12.4")),
    Change("platform linux x86_64 -> linux aarch64", environment(platform="linux aarch64")),
    Change("torch 2.11.0 -> 2.11.0+cu130", environment(torch="2.11.0+cu130")),
    Change("cuda 13.0 -> 13.2", environment(cuda="13.2")),
    Change("toolkit 13.0.88 -> none", environment(toolkit=None)),
    Change("driver 580 -> 590", environment(driver="590.44.01")),
    Change("libraries nothing -> sglang 0.5.9", lambda c: (c.root / "installed/sglang-0.5.9.dist-info").mkdir()),
    Change("device NVIDIA H200 -> NVIDIA B200", environment(gpu="NVIDIA B200")),
    Change("device NVIDIA H200 -> ", environment(device="cpu")),
    Change("memory all -> 2147483648 B", less_memory),
    Change("workload", other_workload),
    Change("workload", setting("seed", 1)),
    Change("expected none -> ", edit("ci/expected_failures.toml", EXPECTED.format(1))),
    Change("tolerance table -> 0.5", setting("tolerance", "0.5")),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.told)
def test_what_counts_gives_another_key_and_is_named(checkout: Checkout, change: Change) -> None:
    before, key = checkout.parts(), checkout.key()

    change.do(checkout)

    (told,) = differing(before, checkout.parts())
    assert told.startswith(change.told)
    assert checkout.key() != key


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda checkout: None, id="nothing"),  # noqa: ARG005 - nothing is done to it
        pytest.param(edit("refgrid/report/terminal.py"), id="how the matrix is printed"),
        pytest.param(edit("refgrid/running/scheduling.py"), id="in which order cases run"),
        pytest.param(edit("truths/unused.py"), id="an adapter of another op"),
        pytest.param(edit("truths/table.py"), id="another row of the table"),
        pytest.param(edit("ci/expected_failures.toml", EXPECTED.format(2)), id="a failure expected of another case"),
        pytest.param(environment(driver="580.200.01"), id="a fix of the same driver branch"),
        pytest.param(environment(gpu_count=8), id="the number of GPUs"),
    ],
)
def test_what_does_not_count_leaves_the_key(checkout: Checkout, change: Callable[[Checkout], None]) -> None:
    before = checkout.key()

    change(checkout)

    assert checkout.key() == before


def test_a_reference_alone_depends_on_no_adapter(checkout: Checkout) -> None:
    keys = [checkout.key(f"double_n4-b1-{check}") for check in ("shape", "dtype", "determinism", "sum")]
    edit("truths/double.py")(checkout)
    after = [checkout.key(f"double_n4-b1-{check}") for check in ("shape", "dtype", "determinism", "sum")]

    assert [old == new for old, new in zip(keys, after, strict=True)] == [True, True, True, False]
    assert len(set(keys)) == 4


def test_without_an_origin_all_of_a_providers_package_counts(checkout: Checkout) -> None:
    checkout.truths(__init__=PROVIDER)
    before = checkout.key()

    edit("truths/unused.py")(checkout)

    assert checkout.key() != before


def test_an_adapter_whose_text_cannot_be_told_is_never_the_same(checkout: Checkout) -> None:
    edit("truths/__init__.py", "\nOrigin.modules = ('truths.nowhere',)\n")(checkout)

    assert checkout.key() != checkout.key()


def test_an_adapter_that_does_not_parse_still_has_a_key(checkout: Checkout) -> None:
    edit("truths/double.py", "def (\n")(checkout)

    assert checkout.key() == checkout.key()


def test_a_file_of_tensors_counts_by_its_content(checkout: Checkout) -> None:
    file = checkout.root / "workloads" / "double" / "double_n4.jsonl"
    given = '{"type": "safetensors", "path": "x.safetensors", "tensor_key": "x"}'
    file.write_text(file.read_text().replace('{"type": "random"}', given))
    (checkout.root / "x.safetensors").write_bytes(b"1")
    before = checkout.parts()

    (checkout.root / "x.safetensors").write_bytes(b"2")

    (told,) = differing(before, checkout.parts())
    assert told.startswith("workload")


def test_an_edit_after_the_key_was_asked_for_is_noticed(checkout: Checkout) -> None:
    keys, cases = checkout.keys()
    case = cases["double_n4-b1-sum"]
    keys.key(case)
    assert not keys.edited(case)

    edit("truths/halves.py")(checkout)

    assert keys.edited(case)
    assert not keys.edited(cases["double_n4-b1-shape"])


@pytest.mark.parametrize("file", ["refgrid/proving/tolerance.toml", "refgrid/proving/tolerance.json"])
def test_an_edit_of_the_table_of_tolerances_is_noticed_too(checkout: Checkout, file: str) -> None:
    keys, cases = checkout.keys()
    case = cases["double_n4-b1-shape"]
    keys.key(case)

    edit(file)(checkout)

    assert keys.edited(case)


def test_the_table_of_ground_truth_tells_where_each_adapter_comes_from() -> None:
    sources = Sources()
    package = Modules.of("refgrid_groundtruth")

    for source in GROUND_TRUTH:
        for op in source.ops:
            origin = sources.origin(source.name, op)
            reached = package.reached(origin.modules, origin.apart)
            assert {"refgrid_groundtruth", "refgrid_groundtruth.selftest", *origin.modules} <= set(reached)
            assert "refgrid_groundtruth.table" not in reached
            assert source.name in origin.row


@pytest.mark.parametrize("name", ["NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "FLASHINFER_CUDA_ARCH_LIST"])
def test_a_variable_that_changes_what_is_computed_counts(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv(name, raising=False)
    before = checkout.parts()

    monkeypatch.setenv(name, "1")

    (told,) = differing(before, checkout.parts())
    assert f"{name}=1" in told


@pytest.mark.parametrize("name", ["TRITON_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE", "TORCH_LOGS", "HOME", "OMP_THREADS"])
def test_a_variable_that_says_where_to_write_does_not(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = checkout.parts()

    monkeypatch.setenv(name, "elsewhere")

    assert differing(before, checkout.parts()) == []

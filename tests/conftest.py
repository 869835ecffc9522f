"""Shared by the tests of the instrument: small data sets on disk, and pytest's own test bench."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from projects import Project

pytest_plugins = ["pytester"]

TESTS = Path(__file__).parent
# In a test file: torch itself, a module of the instrument that imports it, or a pytest of its own.
NEEDS_TORCH = re.compile(
    r"import torch|importorskip|refgrid\.proving(\.(?!deaths|expected|finding|tolerance)| import)|\"-m\", \"pytest\""
    r"|from (projects|fleet|guards) import"
)
REFERENCE = "import torch\n\ndef run(x):\n    return x * 2\n"


def pytest_configure(config: pytest.Config) -> None:
    """Workers share the cores, as where cases run: two with two threads each on two cores wait more than they work.

    Tests of solutions/ run without the instrument, too, and must find it nowhere.
    """
    if hasattr(config, "workerinput") and importlib.util.find_spec("refgrid"):  # not the controller: workers inherit it
        from refgrid.running.worker import share_cores

        share_cores()


def _out_of_reach(file: Path) -> bool:
    """Whether a test file needs torch, and there is none."""
    if file.suffix != ".py" or importlib.util.find_spec("torch"):
        return False
    return file.name.startswith("test_") and bool(NEEDS_TORCH.search(file.read_text()))


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """The instrument is tested without torch, too: by the files that neither import it nor run cases."""
    return _out_of_reach(collection_path) or None


def pytest_report_header() -> list[str]:
    """The others are named, not dropped in silence."""
    names = [file.name for file in sorted(TESTS.glob("test_*.py")) if _out_of_reach(file)]
    return [f"without torch, so not here: {', '.join(names)}"] if names else []


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Tests of solutions/ run its Triton kernels on a CPU, which is settled before torch's compiler imports Triton.

    Not when the folder is only seen in passing: tests/gpu and the product itself need kernels that are compiled.
    """
    if module_path.parent.name == "solutions" and importlib.util.find_spec("triton"):
        importlib.import_module("interpreted_triton")


@pytest.fixture(autouse=True)
def _fresh_adapters(request: pytest.FixtureRequest) -> Iterator[None]:
    """Adapters are found once a process; a test must not see what another found, but the product proves once."""
    yield
    groundtruth = sys.modules.get("refgrid_groundtruth")
    if groundtruth and request.path.parent.name != "references":
        groundtruth._outcome.cache_clear()


@pytest.fixture(scope="session")
def pristine_double() -> dict[str, Any]:
    """A definition that doubles its input, as the dictionary of its file; not to be changed."""
    return {
        "name": "double_n4",
        "op_type": "double",
        "axes": {"batch_size": {"type": "var"}, "n": {"type": "const", "value": 4}},
        "inputs": {"x": {"shape": ["batch_size", "n"], "dtype": "float32"}},
        "outputs": {"y": {"shape": ["batch_size", "n"], "dtype": "float32"}},
        "reference": REFERENCE,
    }


@pytest.fixture
def double(pristine_double: dict[str, Any]) -> dict[str, Any]:
    """The same, to damage."""
    return copy.deepcopy(pristine_double)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors on few cores: threads that wait for each other would take most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


WriteDefinition = Callable[..., Path]


def _writer(root: Path) -> WriteDefinition:
    def write(definition: dict[str, Any] | str, *batch_sizes: int, name: str = "double_n4") -> Path:
        text = definition if isinstance(definition, str) else json.dumps(definition)
        name = name if isinstance(definition, str) else definition["name"]
        file = root / "definitions" / "double" / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        lines = [
            {
                "definition": name,
                "workload": {"uuid": f"b{size}", "axes": {"batch_size": size}, "inputs": {"x": {"type": "random"}}},
            }
            for size in batch_sizes
        ]
        workloads = root / "workloads" / "double" / f"{name}.jsonl"
        workloads.parent.mkdir(parents=True, exist_ok=True)
        workloads.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return file

    return write


@pytest.fixture(scope="session")
def writer_below() -> Callable[[Path], WriteDefinition]:
    """Gives the writer of a data set below some folder."""
    return _writer


@pytest.fixture
def write_definition(tmp_path: Path) -> WriteDefinition:
    """Writes one definition and its workloads below tmp_path; returns the definition's file."""
    return _writer(tmp_path)


@pytest.fixture
def project(double: dict[str, Any], write_definition: WriteDefinition, tmp_path: Path) -> Project:
    """A project whose reference is right."""
    from projects import Project  # it imports the instrument, without which tests of solutions/ run

    made = Project(tmp_path, double, write_definition)
    made.reference("return x * 2")
    return made

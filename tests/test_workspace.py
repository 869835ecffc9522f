"""The workspace as files: locks name no machine, are current, and keep the references apart from ground truth."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from refgrid.environments import EnvironmentSpec, load_environments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SPECS = load_environments(ROOT / "ci" / "environments.toml")
PUBLIC = {"https://pypi.org/simple", "https://files.pythonhosted.org"}
GROUND_TRUTH = {"refgrid-groundtruth", "flashinfer-python", "flashinfer-cubin", "sglang", "sglang-kernel", "sgl-kernel"}

_LOCK_LINE = re.compile(r"#.*|[a-z0-9-]+==[\w.!+]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")
_ADDRESS = re.compile(r"[a-z]+://[^/\"]*(?:/simple(?=\"))?|\"/[^\"]*\"|[A-Z]:\\\\[^\"]*")


def strange_lines(lock: str) -> list[str]:
    """Lines of a lock that are neither comment, exact pin nor hash: an index, a path, an address."""
    return [line for line in lock.splitlines() if not _LOCK_LINE.fullmatch(line) or "/" in line]


def strange_addresses(uv_lock: str) -> set[str]:
    """Addresses in uv.lock that are not the public index's."""
    return set(_ADDRESS.findall(uv_lock)) - PUBLIC


def pinned(lock: str) -> dict[str, set[str]]:
    """Distribution -> the versions that a lock holds, several where they depend on the Python."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", lock, re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def faults(spec: EnvironmentSpec, lock: str, project: Mapping[str, Any]) -> list[str]:
    """What is stale or wrong in the lock of one environment; empty for a current one."""
    held = pinned(lock)
    told = f"(as of {spec.exclude_newer}, Python {spec.python})"
    found = [] if told in lock else [f"the lock is not {told}"]
    wanted = [Requirement(pin) for pin in spec.pins if spec.cuda or not pin.startswith("torch==")]
    if spec.kind == "venv":
        wanted += map(Requirement, project["project"]["dependencies"] + project["dependency-groups"]["test"])
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": "3.12"}):
            found += _unmet(requirement, held.get(canonicalize_name(requirement.name), set()))
    unwanted = [*spec.without, *([] if spec.cuda else ["torch"])]
    return found + [f"{name} does not belong there" for name in unwanted if name in held]


def _unmet(requirement: Requirement, versions: set[str]) -> list[str]:
    met = versions and all(requirement.specifier.contains(version, prereleases=True) for version in versions)
    return [] if met else [f"{requirement} is not met by {sorted(versions) or 'nothing'}"]


def lock_of(name: str) -> str:
    return (ROOT / "ci" / "locks" / SPECS[name].lock).read_text()


def uv(*arguments: str, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """uv without network: what it answers must follow from the files alone."""
    command = [find_uv_bin(), *arguments, "--offline", "--python", sys.executable]
    return subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)


def closure(*arguments: str) -> set[str]:
    """Distributions that uv.lock installs, members included."""
    told = uv("export", "--locked", "--no-hashes", "--no-header", "--no-annotate", "--no-default-groups", *arguments)
    assert told.returncode == 0, told.stderr
    members = {"-e .": "refgrid", "-e ./references": "refgrid-references", "-e ./groundtruth": "refgrid-groundtruth"}
    return {members.get(line, re.split(r"[=\[ ]", line)[0]) for line in told.stdout.splitlines()}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The workspace's pyproject files and uv.lock, to be damaged."""
    for name in ("pyproject.toml", "uv.lock", "references/pyproject.toml", "groundtruth/pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def test_every_environment_has_a_lock_and_every_lock_an_environment() -> None:
    assert {spec.lock for spec in SPECS.values()} == {file.name for file in (ROOT / "ci" / "locks").iterdir()}


@pytest.mark.parametrize("name", SPECS)
def test_a_lock_names_no_machine_and_no_index(name: str) -> None:
    assert strange_lines(lock_of(name)) == []


@pytest.mark.parametrize(
    "line",
    [
        "--index-url https://pypi.org/simple",
        "--find-links wheels",
        "#    uv pip compile /home/me/pins.in",
        "-e .",
        "torch @ file:///home/me/torch.whl",
        "torch>=2.5 \\",
        "    --hash=md5:0123",
    ],
)
def test_a_line_that_names_a_machine_or_pins_nothing_is_noticed(line: str) -> None:
    assert strange_lines(lock_of("cpu") + line + "\n") == [line]


@pytest.mark.parametrize("name", SPECS)
def test_a_lock_is_current(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert faults(SPECS[name], lock_of(name), project) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        pytest.param("torch==2.11.0", "torch==2.10.0", "torch==2.11.0 is not met by ['2.10.0']", id="other pin"),
        pytest.param("torch==2.11.0", "", "torch==2.11.0 is not met by nothing", id="pin gone"),
        pytest.param("hypothesis==6", "hypothesis==5", "hypothesis>=6.130 is not met", id="test group"),
        pytest.param("pydantic==2", "pydantic==1", "pydantic>=2.10 is not met", id="own requirement"),
        pytest.param("as of 2026", "as of 2025", "the lock is not (as of 2026", id="other date"),
        pytest.param("Python 3.12", "Python 3.11", "the lock is not (as of 2026", id="other Python"),
    ],
)
def test_a_stale_lock_is_noticed(old: str, new: str, fault: str) -> None:
    project, lock = tomllib.loads((ROOT / "pyproject.toml").read_text()), lock_of("cu130")
    assert old in lock

    found = faults(SPECS["cu130"], lock.replace(old, new), project)
    assert [each for each in found if each.startswith(fault)]


@pytest.mark.parametrize("name", ["torch", "triton", "nvidia-nccl-cu13"])
def test_torch_and_its_cuda_libraries_are_noticed_in_the_cpu_lock(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    assert faults(SPECS["cpu"], f"{lock_of('cpu')}{name}==1.0 \\\n", project) == [f"{name} does not belong there"]


def test_the_cpu_lock_holds_no_cuda_library() -> None:
    assert {name for name in pinned(lock_of("cpu")) if name.startswith(("nvidia-", "cuda-"))} == {"nvidia-ml-py"}


def test_uv_lock_names_the_public_index_only() -> None:
    assert strange_addresses((ROOT / "uv.lock").read_text()) == set()


@pytest.mark.parametrize(
    ("line", "address"),
    [
        ('source = { registry = "/home/me/wheels" }', '"/home/me/wheels"'),
        ('source = { registry = "https://mirror.example/simple" }', "https://mirror.example/simple"),
        ('{ url = "http://10.0.0.1/packages/torch.whl" }', "http://10.0.0.1"),
        ('{ url = "file:///home/me/torch.whl" }', "file://"),
    ],
)
def test_another_address_in_uv_lock_is_noticed(line: str, address: str) -> None:
    assert strange_addresses(line) == {address}


def test_uv_lock_is_current() -> None:
    told = uv("lock", "--check")

    assert told.returncode == 0, told.stderr


def test_a_stale_uv_lock_is_noticed(workspace: Path) -> None:
    project = workspace / "references" / "pyproject.toml"
    project.write_text(project.read_text().replace("torch>=2.5", "torch>=2.6"))

    assert uv("lock", "--check", at=workspace).returncode != 0


def test_the_copied_workspace_is_current_before_it_is_damaged(workspace: Path) -> None:
    assert uv("lock", "--check", at=workspace).returncode == 0


def test_the_references_come_without_any_ground_truth() -> None:
    found = closure("--package", "refgrid-references")

    assert {"refgrid-references", "torch"} <= found
    assert found & GROUND_TRUTH == set()


def test_ground_truth_in_a_closure_would_be_noticed() -> None:
    assert closure("--package", "refgrid-groundtruth") & GROUND_TRUTH == {"refgrid-groundtruth"}


def test_the_instrument_comes_without_torch() -> None:
    found = closure("--package", "refgrid")

    assert "pytest" in found
    assert "torch" not in found

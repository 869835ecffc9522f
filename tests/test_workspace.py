"""The workspace as files: uv.lock names no machine, is current, and keeps the references apart from ground truth."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = {"https://pypi.org/simple", "https://files.pythonhosted.org"}
GROUND_TRUTH = {"refgrid-groundtruth", "flashinfer-python", "flashinfer-cubin", "sglang", "sglang-kernel", "sgl-kernel"}

_ADDRESS = re.compile(r"[a-z]+://[^/\"]*(?:/simple(?=\"))?|\"/[^\"]*\"|[A-Z]:\\\\[^\"]*")


def strange_addresses(uv_lock: str) -> set[str]:
    """Addresses in uv.lock that are not the public index's."""
    return set(_ADDRESS.findall(uv_lock)) - PUBLIC


def uv(*arguments: str, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """uv without network: what it answers must follow from the files alone."""
    command = [find_uv_bin(), *arguments, "--offline", "--python", sys.executable]
    return subprocess.run(command, cwd=at, capture_output=True, text=True, check=False)


def closure(*arguments: str) -> set[str]:
    """Distributions that uv.lock installs, members included."""
    told = uv("export", "--locked", "--no-hashes", "--no-header", "--no-annotate", "--no-default-groups", *arguments)
    assert told.returncode == 0, told.stderr
    folders = ("references", "groundtruth", "solutions")
    members = {"-e .": "refgrid", **{f"-e ./{folder}": f"refgrid-{folder}" for folder in folders}}
    return {members.get(line, re.split(r"[=\[ ]", line)[0]) for line in told.stdout.splitlines()}


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The workspace's pyproject files and uv.lock, to be damaged."""
    members = [f"{folder}/pyproject.toml" for folder in ("references", "groundtruth", "solutions")]
    for name in ("pyproject.toml", "uv.lock", *members):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


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


def test_the_solutions_come_without_any_ground_truth() -> None:
    found = closure("--package", "refgrid-solutions")

    assert {"refgrid-solutions", "torch"} <= found
    assert found & GROUND_TRUTH == set()


def test_ground_truth_in_a_closure_would_be_noticed() -> None:
    assert closure("--package", "refgrid-groundtruth") & GROUND_TRUTH == {"refgrid-groundtruth"}


def test_the_instrument_comes_without_torch() -> None:
    found = closure("--package", "refgrid")

    assert "pytest" in found
    assert "torch" not in found

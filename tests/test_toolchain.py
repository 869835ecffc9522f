"""What compiling needs of a machine, or what is said where it is missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refgrid.environments import toolchain
from refgrid.environments.toolchain import ARCHITECTURES, ToolchainError, add_headers, choose_architectures, nvcc


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "CPLUS_INCLUDE_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ARCHITECTURES, "")  # so that what is set by these tests is taken back
    monkeypatch.setattr(toolchain, "_of_gpus", lambda: iter(()))
    monkeypatch.chdir(tmp_path)


def tool(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return file


def test_what_is_asked_for_comes_before_what_is_set_and_that_before_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "_of_gpus", lambda: iter(("9.0a", "9.0a", "8.9")))
    assert choose_architectures("") == "8.9 9.0a"

    monkeypatch.setenv(ARCHITECTURES, "10.0a")
    assert choose_architectures("") == "10.0a"
    assert choose_architectures("9.0a") == os.environ[ARCHITECTURES] == "9.0a"


def test_without_a_gpu_somebody_has_to_say() -> None:
    with pytest.raises(ToolchainError, match=r"no GPU here says what to compile for: give --arch, such as 9\.0a"):
        choose_architectures("")


@pytest.mark.parametrize("wrong", ["90a", "sm_90", "9.0a,8.9", "9.0b"])
def test_what_is_no_compute_capability_is_refused(wrong: str) -> None:
    with pytest.raises(ToolchainError, match="is no compute capability: should be such as"):
        choose_architectures(wrong)


def test_cuda_home_alone_counts_where_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = tool(tmp_path / "cuda" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(found.parent))
    assert nvcc() == found

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "empty"))
    with pytest.raises(ToolchainError, match=r"no-compiler: .*CUDA_HOME is .*empty"):
        nvcc()


def test_headers_that_the_toolkit_lacks_come_from_the_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, wheels = tool(tmp_path / "cuda" / "bin" / "nvcc"), tmp_path / "site" / "nvidia"
    for folder, name in (("cu13", "cublasLt.h"), ("cuda_runtime", "cuda_runtime.h")):
        (wheels / folder / "include").mkdir(parents=True)
        (wheels / folder / "include" / name).touch()
    monkeypatch.setattr(toolchain, "_wheel_folders", lambda: sorted(wheels.glob("*/include")))
    monkeypatch.setenv("CPLUS_INCLUDE_PATH", "/mine")

    assert add_headers(compiler) == [wheels / "cu13" / "include"]
    assert os.environ["CPLUS_INCLUDE_PATH"] == f"/mine:{wheels / 'cu13' / 'include'}"


def test_a_whole_toolkit_needs_no_headers_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tool(tmp_path / "cuda" / "bin" / "nvcc")
    there = tmp_path / "cuda" / "targets" / "x86_64-linux" / "include"
    other = tmp_path / "site" / "include"
    for folder in (there, other):
        folder.mkdir(parents=True)
        for name in toolchain._LIBRARY_HEADERS:
            (folder / name).touch()
    monkeypatch.setattr(toolchain, "_wheel_folders", lambda: [other])

    assert add_headers(compiler) == []
    assert "CPLUS_INCLUDE_PATH" not in os.environ

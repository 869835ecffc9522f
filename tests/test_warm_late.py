"""After a warm, what a run compiles nevertheless is a finding in its record."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refgrid.records.record import Run, read_runs
from refgrid.warming.late_compiles import STAMP, CompiledModules, Stamp, folder_of, read_stamp, write_stamp

VERSIONS = {"torch": "2.11.0", "flashinfer-python": "0.6.12"}


def module(base: Path, name: str, text: str = "machine code") -> Path:
    file = folder_of(base) / "0.6.12" / "90a" / "cached_ops" / name / f"{name}.so"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def stamped(base: Path, *names: str) -> None:
    for name in names:
        module(base, name)
    write_stamp(base, Stamp(names, "9.0a", VERSIONS))


def test_a_module_that_is_new_is_late(tmp_path: Path) -> None:
    stamped(tmp_path, "rope")
    before = CompiledModules(tmp_path)
    module(tmp_path, "norm")
    module(tmp_path, "topk")

    assert before.late() == ["compiled late: norm", "compiled late: topk"]


def test_a_module_that_was_compiled_again_is_late(tmp_path: Path) -> None:
    stamped(tmp_path, "rope")
    before = CompiledModules(tmp_path)
    os.utime(module(tmp_path, "rope"), ns=(1, 1))

    assert before.late() == ["compiled late: rope"]


def test_what_stays_as_it_was_is_not_late(tmp_path: Path) -> None:
    stamped(tmp_path, "rope")

    assert CompiledModules(tmp_path).late() == []


def test_without_a_warm_nothing_is_late(tmp_path: Path) -> None:
    before = CompiledModules(tmp_path)
    module(tmp_path, "norm")

    assert before.late() == []


def test_warms_of_the_same_versions_add_up_others_begin_anew(tmp_path: Path) -> None:
    write_stamp(tmp_path, Stamp(("rope",), "9.0a", VERSIONS))
    write_stamp(tmp_path, Stamp(("norm",), "9.0a", VERSIONS))
    assert read_stamp(tmp_path) == Stamp(("norm", "rope"), "9.0a", VERSIONS)

    write_stamp(tmp_path, Stamp(("topk",), "10.0a", VERSIONS))
    assert read_stamp(tmp_path) == Stamp(("topk",), "10.0a", VERSIONS)


@pytest.mark.parametrize("text", ["", "[]", '{"modules": 3}', "{"])
def test_a_stamp_that_nobody_can_read_is_none(tmp_path: Path, text: str) -> None:
    folder_of(tmp_path).mkdir(parents=True)
    (folder_of(tmp_path) / STAMP).write_text(text)

    assert read_stamp(tmp_path) is None


# ---- what other libraries build by tvm-ffi


def by_tvm_ffi(cache: Path, name: str) -> Path:
    file = cache / name / f"{name.partition('__arch_')[0]}.so"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("machine code")
    return cache


def test_where_some_were_compiled_ahead_another_is_late(tmp_path: Path) -> None:
    write_stamp(tmp_path, Stamp(("rope", "sgl_rope__arch_9.0"), "9.0a", VERSIONS))
    cache = by_tvm_ffi(tmp_path / "tvm-ffi", "sgl_rope__arch_9.0")
    before = CompiledModules(tmp_path, cache)
    by_tvm_ffi(cache, "sgl_activation__arch_9.0")
    (cache / "libtorch_c_dlpack_addon.so").write_text("tvm-ffi's own, for an older torch")

    assert before.late() == ["compiled late: sgl_activation__arch_9.0"]


def test_where_none_could_be_compiled_ahead_none_is_late(tmp_path: Path) -> None:
    stamped(tmp_path, "rope")
    cache = by_tvm_ffi(tmp_path / "tvm-ffi", "left_by_an_earlier_run")
    before = CompiledModules(tmp_path, cache)
    by_tvm_ffi(cache, "sgl_activation")

    assert before.late() == []


# ---- a real run, whose ground truth compiles

CONFTEST = """
import os, pathlib, pytest

@pytest.fixture(autouse=True)
def _compiles():
    name = os.environ.get("COMPILES")
    folder = pathlib.Path(os.environ["FLASHINFER_WORKSPACE_BASE"], ".cache/flashinfer/0.6.12/90a/cached_ops")
    if name:
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / (name + ".so")).write_text("machine code")
        other = pathlib.Path(os.environ["TVM_FFI_CACHE_DIR"], "sgl_" + name)
        other.mkdir(exist_ok=True)
        (other / ("sgl_" + name + ".so")).write_text("machine code")
    yield
"""
TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"
"""


def run(root: Path, *options: str, compiles: str = "") -> tuple[Run, str]:
    (root / "conftest.py").write_text(CONFTEST)
    (root / "test_double.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    caches = {"FLASHINFER_WORKSPACE_BASE": str(root / "kernels"), "TVM_FFI_CACHE_DIR": str(root / "tvm-ffi")}
    env = {**os.environ, **caches, "COMPILES": compiles}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--device", "cpu", *options]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False, timeout=300)
    (found,) = read_runs(root / "results")
    return found, done.stdout


@pytest.mark.parametrize("options", [(), ("-n2", "--dist=load", "--max-worker-restart=10000")], ids=["alone", "xdist"])
def test_a_late_compile_is_in_the_record_and_in_the_summary(
    tmp_path: Path, double: dict[str, Any], write_definition: Any, options: tuple[str, ...]
) -> None:
    write_definition(double, 1, 2)
    stamped(tmp_path / "kernels", "rope", "sgl_rope")
    by_tvm_ffi(tmp_path / "tvm-ffi", "sgl_rope")

    found, told = run(tmp_path, *options, compiles="norm")

    assert found.findings == ("compiled late: norm", "compiled late: sgl_norm")
    assert "finding: compiled late: norm" in told


def test_a_run_that_compiles_nothing_finds_nothing(
    tmp_path: Path, double: dict[str, Any], write_definition: Any
) -> None:
    write_definition(double, 1, 2)
    stamped(tmp_path / "kernels", "rope")

    found, told = run(tmp_path)

    assert found.findings == ()
    assert "late" not in told

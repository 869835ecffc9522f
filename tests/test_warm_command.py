"""`refgrid warm` in processes of its own, with a ground truth whose modules a shell script compiles."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

PROVIDER = """
import dataclasses

@dataclasses.dataclass(frozen=True)
class Source:
    name: str
    library: str = "torch"
    distribution: str = "torch"
    ops: tuple = ("double",)

SOURCES = (Source("ahead"), Source("late"), Source("absent"), Source("broken"))
"""
KERNELS = """
import functools, os, pathlib, subprocess
from types import SimpleNamespace

ROOT = pathlib.Path(os.environ["FLASHINFER_WORKSPACE_BASE"], ".cache/flashinfer/1.0/90a/cached_ops")

class Absent(Exception):
    verdict, reason = "missing", "absent is not installed"

def compile(name):
    folder = ROOT / name
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / f"{name}.so").exists():
        done = subprocess.run(["sh", "-c", os.environ["COMPILER"], name], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)

def module(name):
    library, folder = ROOT / name / f"{name}.so", ROOT / name
    return SimpleNamespace(
        name=name, library=library, folder=folder, sources=1, compile=functools.partial(compile, name)
    )

def kernels(source, op, inputs):
    if source == "absent":
        raise Absent
    if source == "broken" and os.environ.get("BROKEN"):
        raise TypeError("gen_double() takes 2 arguments")
    (rows, width), dtype = inputs["x"]
    assert rows is None, "a workload binds it"
    names = [f"double_{width}_{dtype}", "common"] if source == "ahead" else []
    return SimpleNamespace(ahead=[module(name) for name in names], at_first_call="Triton" * (source == "late"))
"""
COMPILER = "printf '\\177ELF' > $0.so; head -c 60 /dev/zero >> $0.so"  # as much of a library as is looked at
ENVIRONMENTS = """
[[environment]]
name = "cu130"
kind = "venv"
python = "3.12"
pins = ["torch==2.11.0"]
cuda = "13.0"
origin = "a test"
exclude-newer = 2026-07-15
"""


class Ended(NamedTuple):
    status: int
    out: str
    err: str


class Project:
    """A data set of two definitions, a provider, a compiler and a ninja, none of which is real."""

    def __init__(self, root: Path) -> None:
        self.root, self.tools, self.cuda = root, root / "tools", root / "cuda"
        package = root / "provider"
        package.mkdir()
        (package / "__init__.py").write_text(PROVIDER)
        (package / "kernels.py").write_text(KERNELS)
        info = root / "provider-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: provider\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[refgrid.sources]\nprovider = provider\n")
        self.tool(self.tools / "ninja", "echo 1.13.0")
        self.tool(self.cuda / "bin" / "nvcc", "echo release 13.0, V13.0.88")

    def tool(self, file: Path, text: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)

    def warm(self, *options: str, **variables: str) -> Ended:
        given = {
            **{name: value for name, value in os.environ.items() if name != "FLASHINFER_CUDA_ARCH_LIST"},
            "PYTHONPATH": str(self.root),
            "FLASHINFER_WORKSPACE_BASE": str(self.root / "kernels"),
            "CUDA_HOME": str(self.cuda),
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "COMPILER": COMPILER,
            **variables,
        }
        start = "from refgrid.cli import main; main()"
        command = [sys.executable, "-c", start, "warm", "--op-type", "double", *options]
        done = subprocess.run(
            command, cwd=self.root, env=given, capture_output=True, text=True, check=False, timeout=300
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    @property
    def stamp(self) -> dict[str, Any]:
        return dict(json.loads((self.root / "kernels/.cache/flashinfer/refgrid-warm.json").read_text()))

    def built(self) -> list[str]:
        return sorted(file.stem for file in (self.root / "kernels").rglob("*.so"))


@pytest.fixture
def project(tmp_path: Path, double: dict[str, Any], write_definition: Any) -> Project:
    write_definition(double, 1)
    write_definition({**double, "name": "double_n8", "axes": {**double["axes"], "n": {"type": "const", "value": 8}}}, 1)
    return Project(tmp_path)


def test_all_modules_of_all_definitions_are_compiled_once_and_stamped(project: Project) -> None:
    first = project.warm("--arch", "9.0a", "--jobs", "2")
    again = project.warm("--arch", "9.0a", "--jobs", "2")

    assert first.status == again.status == 0, first.err
    assert project.built() == ["common", "double_4_float32", "double_8_float32"]
    assert "3 modules, up to 2 compilers at once" in first.err
    assert "3 compiled, 0 were there, 0 failed" in first.out
    assert "0 compiled, 3 were there, 0 failed" in again.out
    assert project.stamp["modules"] == ["common", "double_4_float32", "double_8_float32"]
    assert project.stamp["architectures"] == "9.0a"


def test_only_what_is_asked_for_is_compiled(project: Project) -> None:
    assert project.warm("--arch", "9.0a", "--definition-name", "double_n8").status == 0
    assert project.built() == ["common", "double_8_float32"]


def test_a_failure_names_module_and_error_and_the_others_are_there(project: Project) -> None:
    compiler = 'case $0 in common) echo "common.cu(3): error: no" >&2; exit 1;; esac; ' + COMPILER
    ended = project.warm("--arch", "9.0a", COMPILER=compiler)

    assert ended.status == 1
    assert "error: common: common.cu(3): error: no" in ended.err
    assert "2 compiled, 0 were there, 1 failed" in ended.out
    assert project.built() == project.stamp["modules"] == ["double_4_float32", "double_8_float32"]


def test_a_library_that_was_cut_short_is_compiled_again(project: Project) -> None:
    project.warm("--arch", "9.0a")
    (library,) = (project.root / "kernels").rglob("common.so")
    library.write_bytes(library.read_bytes()[:10])
    again = project.warm("--arch", "9.0a")

    assert f"cut short, so it is compiled again: {library}" in again.out
    assert "1 compiled, 2 were there, 0 failed" in again.out


def test_where_nothing_could_be_compiled_no_later_compile_is_late(project: Project) -> None:
    ended = project.warm("--arch", "9.0a", COMPILER="echo 'cannot find -lcuda' >&2; exit 1")

    assert ended.status == 1
    assert "0 compiled, 0 were there, 3 failed" in ended.out
    assert "stamp: " not in ended.out
    assert not list(project.root.rglob("refgrid-warm.json"))


def test_where_there_is_no_cuda_there_is_nothing_to_do(project: Project) -> None:
    (project.root / "ci").mkdir()
    (project.root / "ci/environments.toml").write_text(
        ENVIRONMENTS.replace('cuda = "13.0"', "").replace("cu130", "cpu")
    )
    ended = project.warm("--environment", "cpu")

    assert (ended.status, ended.out) == (0, "nothing to compile ahead: environment cpu has no CUDA\n")


def test_a_source_that_cannot_tell_its_modules_is_a_failure_too(project: Project) -> None:
    ended = project.warm("--arch", "9.0a", BROKEN="1")

    assert ended.status == 1
    assert "error: broken double: double_n8: TypeError: gen_double() takes 2 arguments" in ended.err
    assert len(project.built()) == 3


def test_the_list_tells_modules_and_what_cannot_be_compiled_ahead_and_compiles_nothing(project: Project) -> None:
    (project.cuda / "bin" / "nvcc").unlink()  # a list needs no compiler
    ended = project.warm("--arch", "9.0a", "--list")

    assert ended.status == 0, ended.err
    assert "missing  double_4_float32 (1 sources, for 9.0a)\n         loaded by ahead double" in ended.out
    assert "compiled at the first call: Triton: late double" in ended.out
    assert "cannot be compiled ahead" in ended.out
    assert "not served: missing: absent is not installed: absent double" in ended.out
    assert project.built() == []


def test_without_a_compiler_cuda_home_is_named(project: Project) -> None:
    (project.cuda / "bin" / "nvcc").unlink()
    ended = project.warm("--arch", "9.0a")

    assert ended.status == 1
    assert f"error: no-compiler: there is no nvcc (CUDA_HOME is {project.cuda})" in ended.err


def test_without_ninja_that_is_said(project: Project) -> None:
    (project.tools / "ninja").unlink()
    ended = project.warm("--arch", "9.0a", PATH=str(project.tools))

    assert ended.status == 1
    assert "error: no-compiler: there is no ninja on the PATH" in ended.err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(["--arch", "hopper"], "'hopper' is no compute capability", id="arch"),
        pytest.param(["--jobs", "0"], "0 is not in the range", id="jobs"),
        pytest.param(["--definition-name", "triple"], "'triple'", id="definition"),
        pytest.param(["--environment", "cu99"], "legal values: cu130", id="environment"),
    ],
)
def test_bad_input_is_refused_with_what_it_should_be(project: Project, options: list[str], told: str) -> None:
    (project.root / "ci").mkdir()
    (project.root / "ci/environments.toml").write_text(ENVIRONMENTS)
    ended = project.warm("--arch", "9.0a", *options)

    assert ended.status != 0
    assert told in ended.err
    assert project.built() == []


def test_another_interpreter_than_the_name_says_compiles_nothing(project: Project) -> None:
    (project.root / "ci").mkdir()
    (project.root / "ci/environments.toml").write_text(ENVIRONMENTS)
    ended = project.warm("--arch", "9.0a", "--environment", "cu130")

    assert ended.status == 3
    assert "torch" in ended.err
    assert project.built() == []

"""FlashInfer up to 0.5 builds all its modules in one folder: what is built must not be built again there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refgrid_groundtruth.flashinfer import builds


class Spec:
    """As in 0.5.3: the libraries of all modules are in folders below one, where ninja runs."""

    def __init__(self, folder: Path, name: str = "norm") -> None:
        self.jit_library_path = folder / name / f"{name}.so"
        self.built = 0

    def build(self, verbose: bool, need_lock: bool = True) -> None:  # noqa: ARG002 - FlashInfer's own arguments
        self.built += 1
        self.jit_library_path.write_bytes(b"library" * self.built)


@pytest.fixture
def guarded() -> type[Any]:
    spec_class = type("Guarded", (Spec,), {"build": Spec.build})
    builds.guard(spec_class)
    return spec_class


def test_a_module_is_built_once_for_all_who_ask(guarded: type[Any], tmp_path: Path) -> None:
    first, second = guarded(tmp_path), guarded(tmp_path)

    first.build(verbose=False)
    second.build(verbose=False, need_lock=False)

    assert (first.built, second.built) == (1, 0)


def test_without_the_guard_each_builds_it_again(tmp_path: Path) -> None:
    first, second = Spec(tmp_path), Spec(tmp_path)
    first.jit_library_path.parent.mkdir()

    first.build(verbose=False)
    second.build(verbose=False)

    assert (first.built, second.built) == (1, 1)


@pytest.mark.parametrize("left", [b"", b"lib"])
def test_what_a_killed_linker_left_is_built_again(guarded: type[Any], tmp_path: Path, left: bytes) -> None:
    killed, after = guarded(tmp_path), guarded(tmp_path)
    killed.jit_library_path.parent.mkdir()
    killed.jit_library_path.write_bytes(left)

    after.build(verbose=False)

    assert after.built == 1


def test_a_library_that_was_changed_since_is_built_again(guarded: type[Any], tmp_path: Path) -> None:
    spec = guarded(tmp_path)
    spec.build(verbose=False)
    os.utime(spec.jit_library_path, ns=(1, 1))

    spec.build(verbose=False)

    assert spec.built == 2


def test_a_build_that_fails_is_not_taken_for_built(guarded: type[Any], tmp_path: Path) -> None:
    class Failing(Spec):
        def build(self, verbose: bool, need_lock: bool = True) -> None:
            super().build(verbose, need_lock)
            raise RuntimeError("nvcc")

    builds.guard(Failing)
    with pytest.raises(RuntimeError, match="nvcc"):
        Failing(tmp_path).build(verbose=False)
    spec = guarded(tmp_path)

    spec.build(verbose=False)

    assert spec.built == 1


def test_two_processes_do_not_build_at_once(tmp_path: Path) -> None:
    """Each says when it begins and ends a build; another's words never come between."""
    script = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_shared_builds import Spec, builds

class Slow(Spec):
    def build(self, verbose, need_lock=True):
        with open({str(tmp_path / "log")!r}, "a") as log:
            print("begin", file=log, flush=True)
            time.sleep(0.3)
            self.jit_library_path.write_bytes(b"library")
            print("end", file=log, flush=True)

builds.guard(Slow)
Slow(Path({str(tmp_path)!r}), sys.argv[1]).build(verbose=False)
"""
    running = [subprocess.Popen([sys.executable, "-c", script, name]) for name in ("norm", "rope", "page")]

    assert [process.wait() for process in running] == [0, 0, 0]
    assert (tmp_path / "log").read_text().split() == ["begin", "end"] * 3


def test_a_release_with_a_folder_a_module_is_left_alone() -> None:
    spec_class = type("Later", (Spec,), {"build_dir": None, "build": Spec.build})

    builds.guard(spec_class)

    assert vars(spec_class)["build"] is Spec.build


def test_guarding_twice_is_no_harm(guarded: type[Any]) -> None:
    once = guarded.build

    builds.guard(guarded)

    assert guarded.build is once

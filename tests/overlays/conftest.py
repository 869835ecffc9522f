"""A wheelhouse of small wheels, and what it is laid over."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from containers import Container
from small_wheels import ENTRY, NOISE, Uv, cargo, make_wheel

from refgrid.overlays import wheels
from refgrid.overlays.wheelhouse import build
from refgrid.overlays.wheels import Source

if sys.version_info >= (3, 11):
    pass
else:
    pass


@pytest.fixture(scope="module")
def container(tmp_path_factory: pytest.TempPathFactory) -> Container:
    return Container(tmp_path_factory.mktemp("vendor"))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with one wheel of every kind."""
    (folder := tmp_path / "index").mkdir()
    make_wheel(folder, "kernels", {"kernels/__init__.py": b"VERSION = 1\n", "kernels/big.so": NOISE, **ENTRY})
    by_program = b"import sys, os, dsl; sys.path.insert(0, os.path.join(os.path.dirname(dsl.__file__), 'packages'))\n"
    parts = {"dsl/__init__.py": b"", "dsl/packages/cute.py": b"NAME = 'cute'\n", "dsl.pth": by_program}
    make_wheel(folder, "dsl", {**parts, "plain.pth": b"dsl/more\n", "dsl/more/extra.py": b""})
    data = {"tool-1.0.data/scripts/tool": b"#!/bin/sh\necho tool\n", "tool-1.0.data/purelib/tool.py": b""}
    make_wheel(folder, "tool", {**data, "tool-1.0.data/headers/tool.h": b""})
    return folder


@pytest.fixture
def packed(index: Path, tmp_path: Path) -> Path:
    """A wheelhouse of it all, in parts that the largest wheel does not fit into."""
    build([cargo(index)], tmp_path / "wheelhouse", 80_000)
    return tmp_path / "wheelhouse"


LOCK = """kernels==1.0 \\
    --hash=sha256:aa
dsl==1.0 ; sys_platform == 'linux' \\
    --hash=sha256:bb
windows-only==1.0 ; sys_platform == 'win32' \\
    --hash=sha256:cc
torch==2.13.0 \\
    --hash=sha256:dd
"""


@pytest.fixture
def uv(index: Path, monkeypatch: pytest.MonkeyPatch) -> Uv:
    monkeypatch.setattr(wheels, "_uv", made := Uv(index))
    return made


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (locks := tmp_path / "ci" / "locks").mkdir(parents=True)
    (locks / "mine.txt").write_text(LOCK)
    (folder := tmp_path / "fetched").mkdir()
    return Source(tmp_path, folder)

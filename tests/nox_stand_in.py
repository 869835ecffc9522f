"""Stands in for nox where a session of the noxfile really runs what it is told to, with a `uv` that is a script."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from refgrid.overlays.overlay import MEMBERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
OVERLAY = "src/refgrid/overlays/overlay.py"
PYTHON = ".".join(map(str, sys.version_info[:2]))
# What is installed is as it is; a light environment for the record is this one.
UV = f"""#!/bin/sh
echo "$@" >> uv-calls
case "$1 $2" in
"run --no-sync") shift 3; exec {sys.executable} -c "from refgrid.cli import main; main()" "$@" ;;
"pip sync") echo "Resolved 2 packages in 3ms"; cat refused >&2 2>/dev/null && exit 2 ;;
"pip install") echo "$@" | grep -qe torch== || exit 0; echo "$@" | grep -qe "$(cat torch-place)"; exit ;;
esac
exit 0
"""
TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"
"""
TABLE = """
[[environment]]
name = "cpu"
kind = "venv"
python = "{python}"
pins = ["torch==2.13.0"]
origin = "a test"
exclude-newer = 2026-11-15

[[environment]]
name = "over"
kind = "overlay"
python = "{python}"
pins = ["kernels==1.0"]
machine = ["torch=={torch}"]
origin = "a test"
exclude-newer = 2026-11-15
"""


class CommandFailed(Exception):
    """As nox's."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class SessionFailed(Exception):
    """What nox's `session.error` raises."""


class Session:
    """Has an interpreter of its own, that sees what this one has, and keeps what it ran and said."""

    def __init__(self, root: Path, *posargs: str) -> None:
        self.root, self.posargs = root, list(posargs)
        self.cache_dir, self.bin = root / ".nox" / ".cache", str(root / "python" / "bin")
        self.ran, self.said = list[tuple[str, ...]](), list[str]()
        self.log = self.warn = self.said.append

    def run(
        self, *command: str, env: Any = None, silent: bool = False, success_codes: Any = (0,), **to: Any
    ) -> str | bool:
        self.ran.append(command)
        path = os.pathsep.join([str(self.root), self.bin, os.environ["PATH"]])
        if not (program := shutil.which(command[0], path=path)):
            raise CommandFailed(f"Program {command[0]} not found")
        streams = {name: to.get(name, default) for name, default in (("stdout", subprocess.PIPE), ("stderr", -2))}
        done = subprocess.run(
            [program, *command[1:]],
            cwd=self.root,
            env={**os.environ, "PATH": path, **(env or {})},
            text=True,
            check=False,
            **streams,
        )
        if done.returncode not in success_codes:
            raise CommandFailed(f"Command {' '.join(command)} failed with exit code {done.returncode}:\n{done.stdout}")
        return (done.stdout or "") if silent else True

    run_install = run

    def install(self, *what: str) -> None:
        self.run("uv", "pip", "install", *what)

    def create_tmp(self) -> str:
        (folder := self.root / "tmp").mkdir(exist_ok=True)
        return str(folder)

    def error(self, reason: str) -> None:
        raise SessionFailed(reason)

    def asked(self, word: str) -> int:
        """How many commands had this word."""
        return sum(word in command for command in self.ran)


def checkout(root: Path, torch: str) -> None:
    """A checkout of one definition's tests, two environments, and an interpreter that has what this one has."""
    for name in ("noxfile.py", "pyproject.toml", OVERLAY):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "ci" / "locks").mkdir(parents=True)
    (root / "ci" / "environments.toml").write_text(TABLE.format(python=PYTHON, torch=torch))
    (root / "tests" / "references").mkdir(parents=True)
    (root / "tests" / "references" / "test_double.py").write_text(TESTS)
    (root / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    (root / "uv").write_text(UV)
    (root / "uv").chmod(0o755)
    venv.create(root / "python", with_pip=False, symlinks=True)
    (site,) = (root / "python").glob("lib/python*/site-packages")
    seen = [*(str(ROOT / member) for member in MEMBERS), *(path for path in sys.path if path.endswith("-packages"))]
    (site / "seen.pth").write_text("\n".join(seen) + "\n")


def sessions(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The sessions of a checkout's noxfile by name."""
    made: dict[str, Any] = {}

    def session(function: Any = None, **given: Any) -> Any:
        def declare(function: Any) -> Any:
            return made.setdefault(given.get("name", function.__name__), function)

        return declare(function) if function else declare

    nox = MagicMock(session=session, command=SimpleNamespace(CommandFailed=CommandFailed))
    nox.virtualenv.UV = "uv"
    nox.project.load_toml = lambda file: tomllib.loads(Path(file).read_text())
    monkeypatch.setitem(sys.modules, "nox", nox)
    monkeypatch.chdir(root)
    monkeypatch.delenv("REFGRID_WHEELHOUSE", raising=False)
    runpy.run_path(str(root / "noxfile.py"))
    return made

"""The noxfile's own steps: what `nox -s matrix` installs again, and what it finds there."""

from __future__ import annotations

import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECTS = ("uv.lock", "pyproject.toml", "groundtruth/pyproject.toml", "solutions/pyproject.toml")


class Session:
    """Stands in for nox's: has a virtual environment, and keeps what would be run."""

    def __init__(self, environment: Path) -> None:
        self.virtualenv = SimpleNamespace(location=str(environment))
        self.synced: list[tuple[str, ...]] = []
        self.installed: list[tuple[str, ...]] = []
        self.no_install = self.fails = False

    def run_install(self, *command: str, **_: Any) -> bool | None:
        if self.no_install:
            return None
        if self.fails and "sync" not in command:
            raise OSError("no hatchling here")
        (self.synced if "sync" in command else self.installed).append(command)
        return True


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Its names, without nox, over a copy of the project files."""
    nox = MagicMock()
    nox.project.load_toml = lambda file: tomllib.loads(Path(file).read_text())
    monkeypatch.setitem(sys.modules, "nox", nox)
    names: dict[str, Any] = runpy.run_path(str(ROOT / "noxfile.py"))["_sync_with_sources"].__globals__
    for file in PROJECTS:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    names["ROOT"] = tmp_path
    return names


@pytest.fixture
def session(tmp_path: Path) -> Session:
    (tmp_path / "environment").mkdir()
    return Session(tmp_path / "environment")


def test_what_is_installed_is_not_built_again(noxfile: dict[str, Any], session: Session) -> None:
    for _ in range(2):
        noxfile["_sync_with_sources"](session)

    assert session.installed == [("uv", "pip", "install", "--no-deps", *noxfile["SOURCES"])]
    assert ["--inexact" in command for command in session.synced] == [False, True]


@pytest.mark.parametrize("file", PROJECTS)
def test_a_project_file_that_has_changed_is_installed_anew(
    noxfile: dict[str, Any], session: Session, tmp_path: Path, file: str
) -> None:
    noxfile["_sync_with_sources"](session)
    with (tmp_path / file).open("a") as told:
        told.write("\n")

    noxfile["_sync_with_sources"](session)

    assert len(session.installed) == 2
    assert not any("--inexact" in command for command in session.synced)


def test_another_environment_or_another_place_is_installed_anew(
    noxfile: dict[str, Any], session: Session, tmp_path: Path
) -> None:
    noxfile["_sync_with_sources"](session)
    other = tmp_path / "other"
    other.mkdir()
    fresh = Session(other)
    noxfile["_sync_with_sources"](fresh)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path, moved, ignore=shutil.ignore_patterns("moved"))
    noxfile["ROOT"] = moved
    noxfile["_sync_with_sources"](session)

    assert (len(fresh.installed), len(session.installed)) == (1, 2)


def test_what_nox_was_told_not_to_install_is_not_taken_for_installed(noxfile: dict[str, Any], session: Session) -> None:
    session.no_install = True
    noxfile["_sync_with_sources"](session)
    session.no_install = False

    noxfile["_sync_with_sources"](session)

    assert len(session.installed) == 1


def test_an_install_that_failed_is_tried_again(noxfile: dict[str, Any], session: Session) -> None:
    session.fails = True
    with pytest.raises(OSError, match="no hatchling"):
        noxfile["_sync_with_sources"](session)
    session.fails = False

    noxfile["_sync_with_sources"](session)

    assert len(session.installed) == 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The sessions by name, without nox."""
    sessions: dict[str, Any] = {}
    nox = MagicMock()
    nox.project.load_toml = lambda file: tomllib.loads(Path(file).read_text())

    def session(function: Any = None, **given: Any) -> Any:
        def declare(function: Any) -> Any:
            return sessions.setdefault(given.get("name", function.__name__), function)

        return declare(function) if function else declare

    nox.session = session
    monkeypatch.setitem(sys.modules, "nox", nox)
    runpy.run_path(str(ROOT / "noxfile.py"))
    return sessions


def ran(made: dict[str, Any], cache: Path, session: str, *told: str) -> list[Any]:
    """What a session goes through, of steps and of commands as they follow `python -m`; it may go on in another one."""
    names: dict[str, Any] = made["soak"].__globals__
    order: list[Any] = []
    for step in ("_install", "_audit"):
        names[step] = lambda *_, step=step: order.append(step)
    asked: list[Any] = []
    made[session](SimpleNamespace(posargs=list(told), notify=lambda name, posargs: asked.append((name, posargs))))
    ((name, posargs),) = asked
    made[name](SimpleNamespace(posargs=posargs, cache_dir=cache, run=lambda *words, **_: order.append(words[2:])))
    return order


def test_a_soak_is_audited_before_it_runs(made: dict[str, Any], tmp_path: Path) -> None:
    *steps, command = ran(made, tmp_path, "soak")

    assert steps == ["_install", "_audit"]
    assert command[:2] == ("refgrid", "run-soak")


@pytest.mark.parametrize(
    ("told", "files"),
    [
        (["-k", "grouped", "-x"], ["tests/gpu"]),
        (["tests/gpu/test_zigzag_gpu.py", "-x"], []),
        ([], ["tests/gpu"]),
    ],
)
def test_the_tests_of_a_gpu_run_in_an_environment(
    made: dict[str, Any], tmp_path: Path, told: list[str], files: list[str]
) -> None:
    steps = ran(made, tmp_path, "tests-gpu", "cu130-sglang0.5.15", *told)

    plugins = ("-p", "xdist.plugin", "-p", "refgrid.plugin")
    assert steps == ["_install", ("pytest", *plugins, *files, *told)]

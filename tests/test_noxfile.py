"""The noxfile, which knows the environments before anything is installed: what it cannot make sessions of, it names.

Nox itself is a stand-in here, as the environments of these tests have none.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

NOX = """
import sys
from types import SimpleNamespace
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

options, made = SimpleNamespace(), {}
project = SimpleNamespace(load_toml=lambda file: tomllib.loads(file.read_text()))

def session(function=None, **given):
    def add(function):
        made[given.get("name", function.__name__)] = function
        return function
    return add(function) if function else add

def main():
    print(list(made))
    if "--" in sys.argv:
        words = sys.argv[sys.argv.index("--") + 1 :]
        notify = lambda name, posargs: print(name, posargs)
        made[sys.argv[2]](SimpleNamespace(posargs=words, error=sys.exit, notify=notify))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in ("noxfile.py", "pyproject.toml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "ci", tmp_path / "ci")
    (tmp_path / "nox.py").write_text(NOX)
    return tmp_path


def run(checkout: Path, *arguments: str, named: str = "") -> subprocess.CompletedProcess[str]:
    """`named` is what the variable says that nox reads besides."""
    command = [sys.executable, "noxfile.py", *arguments]
    variables = {**os.environ, "NOXSESSION": named}
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--list"], id="none"),
        pytest.param(["-s", "tests-cpu", "tests-cu128"], id="an environment and a CUDA"),
        pytest.param(["-s", "tests-cu128-sglang0.5.5-3.12"], id="with its Python"),
        pytest.param(["-s", "warm", "--", "cpu", "tests-cu999"], id="what goes to pytest"),
        pytest.param(["--session=tests-cu128"], id="in one word"),
        pytest.param(["-s", "tests-gpu", "--", "cpu"], id="the tests of a GPU, which are no environment's"),
    ],
)
def test_sessions_that_exist_may_be_asked_for(checkout: Path, arguments: list[str]) -> None:
    done = run(checkout, *arguments)

    assert done.returncode == 0, done.stderr
    assert "'tests-cu128'" in done.stdout
    assert "'tests-cu128-sglang0.5.5'" in done.stdout


def test_an_environment_that_does_not_exist_lists_those_that_do(checkout: Path) -> None:
    done = run(checkout, "-s", "tests-cu127", "tests-cpu", "tests-cu130-sglang0.5")

    assert done.returncode == 1
    told = "no environment is called 'cu127', 'cu130-sglang0.5'; legal values: cpu, cu124-sglang0.4.6, "
    assert done.stderr.startswith(told)
    assert done.stderr.endswith("cu124, cu126, cu128, cu130, cu132\n")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        pytest.param(["--session=tests-cu127"], "", id="--session="),
        pytest.param(["--sessions=tests-cu127"], "", id="--sessions="),
        pytest.param(["-s=tests-cu127"], "", id="-s="),
        pytest.param(["-stests-cu127"], "", id="-s and no blank"),
        pytest.param(["-e", "tests-cu127"], "", id="-e"),
        pytest.param([], "lint,tests-cu127", id="NOXSESSION"),
        pytest.param(["--verbose"], "tests-cu127", id="NOXSESSION and an option"),
    ],
)
def test_however_it_is_named(checkout: Path, arguments: list[str], named: str) -> None:
    done = run(checkout, *arguments, named=named)

    assert done.returncode == 1
    assert done.stderr.startswith("no environment is called 'cu127'; legal values: cpu, ")


def test_what_nox_does_not_read_is_not_held_against_anybody(checkout: Path) -> None:
    assert run(checkout, "-s", "lint", named="tests-cu127").returncode == 0


@pytest.mark.parametrize("session", ["warm", "soak", "tests-gpu", "bench-grouped"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        pytest.param("cu127", "no environment is called 'cu127'; legal values: cpu, cu124-", id="unknown"),
        pytest.param("cu128-sglang0.5.4", "cannot be resolved any more, see ci/locks/cu128-sglang0.5.4.", id="gone"),
        pytest.param("cu128-sglang0.5.5", "", id="there"),
    ],
)
def test_what_runs_in_an_environment_names_one_that_cannot_be_had(
    checkout: Path, session: str, name: str, told: str
) -> None:
    done = run(checkout, "-s", session, "--", name)

    assert done.returncode == (1 if told else 0), done.stderr
    assert told in done.stderr
    assert (f"tests-{name} " in done.stdout) is not bool(told)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        pytest.param('name = "cpu"', "", "environment number 1: name should be text, and is 'missing'", id="no name"),
        pytest.param(
            'cuda = "12.6"', "cuda = 12.6", "cu126-sglang0.4.10: cuda should be text, and is 12.6", id="number"
        ),
        pytest.param('kind = "venv"', "kind = venv", "cannot be read: ", id="no TOML"),
        pytest.param("[[environment]]", "[[environments]]", "cannot be read: 'environment'", id="no environment"),
    ],
)
def test_a_table_of_which_no_sessions_can_be_made_names_entry_and_field(
    checkout: Path, old: str, new: str, told: str
) -> None:
    table = checkout / "ci/environments.toml"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new))

    done = run(checkout, "--list")

    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert str(table) in done.stderr
    assert told in done.stderr


def test_what_else_is_wrong_with_the_table_is_left_to_lint(checkout: Path) -> None:
    table = checkout / "ci/environments.toml"
    table.write_text(table.read_text().replace('kind = "venv"', 'kind = "conda"', 1))

    assert run(checkout, "-s", "lint").returncode == 0

"""What a machine can run of the declared environments, and what is missing for the others."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from machines import CONTAINER, H200, ready, table_below

from refgrid.environments import machine
from refgrid.environments.campaign import runnable
from refgrid.environments.declared import EnvironmentsError
from refgrid.environments.machine import Machine, look_around, outside_variables


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return table_below(tmp_path)


@pytest.mark.parametrize(
    ("here", "obstacles"),
    [
        pytest.param(Machine(), ["", "no NVIDIA GPU", "unresolvable: there is no version of a==1", "GPU"], id="laptop"),
        pytest.param(CONTAINER, ["", "", "unresolvable", ""], id="container"),
        pytest.param(
            Machine(H200, "550.54", "12.4", "/usr/bin/python3", "3.12.3", {}),
            ["", "", "unresolvable", "driver 550.54 is too old for CUDA 13.0, which needs 580.65.06"],
            id="older driver",
        ),
        pytest.param(
            Machine(H200, "470.1", "11.4"), ["", "too old for CUDA 12.8", "unres", "too old"], id="oldest driver"
        ),
        pytest.param(
            Machine(H200, "580.159", "13.0", "/usr/bin/python3", "3.11.9", {"torch": "2.10.0"}),
            ["", "", "unres", "/usr/bin/python3 has Python 3.11 but should have 3.12 and torch 2.10.0 but should have"],
            id="another torch",
        ),
        pytest.param(
            Machine(H200, "580.159", "13.0", "/usr/bin/python3", "3.12.3", {"torch": "2.11.0"}),
            ["", "", "unres", ""],
            id="torch without its build label",
        ),
        pytest.param(Machine(H200, "580.159", "13.0"), ["", "", "unres", "no python3 here has"], id="no interpreter"),
    ],
)
def test_what_a_machine_can_run_and_what_else_is_missing(table: Path, here: Machine, obstacles: Sequence[str]) -> None:
    found = [each.obstacle for each in ready(table, here)]

    assert [bool(obstacle) for obstacle in found] == [bool(expected) for expected in obstacles]
    assert all(expected in obstacle for expected, obstacle in zip(obstacles, found, strict=True))


def test_a_column_without_records_says_why(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look_around", lambda: Machine(H200, "550.54", "12.4"))

    assert machine.why_not_recorded(table) == {
        "cpu": "not run yet: nox -s tests-cpu",
        "cu128-old": "not run yet: nox -s tests-cu128-old",
        "cu128-gone": "unresolvable: there is no version of a==1",
        "over": "driver 550.54 is too old for CUDA 13.0, which needs 580.65.06",
    }


def test_this_machine_is_looked_at_from_outside_this_virtual_environment() -> None:
    outside = outside_variables()

    assert str(Path(sys.executable).parent) not in outside["PATH"].split(os.pathsep)
    assert "VIRTUAL_ENV" not in outside
    found = look_around()
    assert found.interpreter is None or re.fullmatch(r"3\.\d+\.\S+", found.python)


def test_another_interpreter_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho >> {asked}\necho \'{{"python": "3.11.9", "distributions": {{}}}}\'\n')
    python.chmod(0o755)
    monkeypatch.setattr(machine, "outside_variables", lambda: {"PATH": str(tmp_path)})

    assert [look_around().python for _ in range(2)] == ["3.11.9"] * 2
    assert len(asked.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("names", "picked"),
    [((), ["cpu", "cu128-old", "over"]), (("over", "cpu"), ["cpu", "over"]), (("cu128",), ["cu128-old"])],
)
def test_without_names_all_that_can_run_are_meant(table: Path, names: Sequence[str], picked: list[str]) -> None:
    assert [each.spec.name for each in runnable(names, ready(table, CONTAINER))] == picked


def test_what_lacks_only_a_gpu_runs_on_the_cpu_where_it_is_named(table: Path) -> None:
    laptop = Machine((), None, None, "/usr/bin/python3", "3.12.3", {"torch": "2.11.0"})

    assert [each.spec.name for each in runnable((), ready(table, laptop))] == ["cpu"]
    assert [each.spec.name for each in runnable(("cu128", "over"), ready(table, laptop))] == ["cu128-old", "over"]
    told = {each.spec.name: each.obstacle for each in ready(table, laptop)}
    assert told["cu128-old"] == "this machine shows no NVIDIA GPU; on the CPU: nox -s tests-cu128-old"


@pytest.mark.parametrize("variable", [None, "elsewhere"])
def test_an_overlay_needs_its_wheelhouse(table: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None) -> None:
    folder = table.parents[1] / "wheelhouse"
    if variable:
        monkeypatch.setenv("REFGRID_WHEELHOUSE", variable)
        folder = table.parents[1] / variable
    else:
        (folder / "manifest.json").unlink()

    told = f"{folder}: no wheelhouse is here; where there is an index: nox -s wheelhouse -- over"
    assert ready(table, CONTAINER)[-1].obstacle == told


def test_and_one_that_was_packed_for_it(table: Path) -> None:
    manifest = table.parents[1] / "wheelhouse" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("over", "other"))
    assert "'over' is no environment of" in ready(table, CONTAINER)[-1].obstacle

    manifest.write_text("{}")
    assert "is no manifest of a wheelhouse" in ready(table, CONTAINER)[-1].obstacle


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (("cu999",), "no environment is called 'cu999'; legal values: cpu, cu128-old, cu128-gone, over, cu128, cu130"),
        (("cpu", "over"), "over cannot run here: over: this machine shows no NVIDIA GPU, and no python3 here has"),
        (("cu128-gone",), "cu128-gone cannot run here: cu128-gone: unresolvable"),
    ],
)
def test_what_was_asked_for_and_cannot_run_is_refused(table: Path, names: Sequence[str], reason: str) -> None:
    with pytest.raises(EnvironmentsError, match=re.escape(reason)):
        runnable(names, ready(table, Machine()))

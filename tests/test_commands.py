"""The `refgrid` command as a newcomer meets it: what its help says, and a folder with nothing to read."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from refgrid.cli import main

TERMINAL = {"COLUMNS": "80"}


def _paragraph(command: click.Command) -> str:
    return " ".join((command.help or "no help").split("\n\n")[0].split())


def test_help_says_of_every_command_in_whole_what_it_is_for() -> None:
    told = " ".join(CliRunner(env=TERMINAL).invoke(main, ["--help"]).output.split())

    assert [name for name, command in main.commands.items() if f"{name} {_paragraph(command)}" not in told] == []


def test_a_matrix_of_nothing_is_refused_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["matrix"])

    assert done.exit_code == 2
    assert "results holds no records and ci/environments.toml names no environment: give --results" in done.output
    assert list(tmp_path.iterdir()) == []

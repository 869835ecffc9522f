"""What README, CONTRIBUTING and `refgrid --help` say of commands, where code says it too."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from refgrid.cli import main
from refgrid.environments.audit import EXIT_CODE

ROOT = Path(__file__).resolve().parents[1]


def exit_codes() -> dict[str, list[str]]:
    """README's table: what each exit code means, by the commands of the row; codes under the empty name."""
    table = (ROOT / "README.md").read_text().partition("## Exit codes\n\n")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {name: cells for name, *cells in rows}


def test_each_command_is_listed_once() -> None:
    shown = Counter(id(command) for command in main.commands.values())

    assert [name for name, command in main.commands.items() if shown[id(command)] > 1] == []
    assert "plan" in main.commands
    assert all(name == command.name for name, command in main.commands.items())


def test_the_exit_code_of_the_audit_is_in_the_table_for_all_who_end_so() -> None:
    codes = exit_codes()
    at = codes[""].index(str(EXIT_CODE))

    told = " ".join(name for name, cells in codes.items() if name and cells[at])
    assert set(re.findall(r"`([^`]+)`", told)) == {
        *("refgrid audit", "refgrid warm", "refgrid overlay", "overlay.py", "pytest")
    }


def test_an_overlay_is_run_by_hand_as_nox_runs_it() -> None:
    crash_safe = re.findall(r'^CRASH_SAFE = \["(.+)", "(.+)"\]$', (ROOT / "noxfile.py").read_text(), re.MULTILINE)
    (by_hand,) = re.findall(r"overlay\.py run (?:.*\\\n)+.*", (ROOT / "CONTRIBUTING.md").read_text())

    (options,) = crash_safe
    assert set(options) <= set(by_hand.split())
    assert "-n auto" in by_hand  # a process that hangs is told from its own only by one beside it

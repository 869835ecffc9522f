"""What README, CONTRIBUTING and `refgrid --help` say of commands, where code says it too."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from refgrid.cli import main
from refgrid.dataset.case import Selection, plan
from refgrid.dataset.definition import load_dataset
from refgrid.environments.audit import EXIT_CODE
from refgrid.sources import Sources

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


def test_the_first_command_of_the_readme_plans_and_lacks_what_it_says() -> None:
    readme = (ROOT / "README.md").read_text()
    (op_type,) = re.findall(r"nox -s tests-cpu -- --op-type (\w+) --test-sizes small   #", readme)
    (numbers,) = re.findall(r"^planned (\d+) = accounted (\d+): (\d+) missing, (\d+) match$", readme, re.MULTILINE)

    sources = Sources()
    serving = {op: sources.serving(op) for op in sources.ops}
    cases = plan(load_dataset(ROOT), serving, Selection((op_type,), (), ("small",)))
    absent = sum(case.source in ("flashinfer", "sglang") for case in cases)
    assert [int(number) for number in numbers] == [len(cases), len(cases), absent, len(cases) - absent]

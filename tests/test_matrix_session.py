"""`nox -s matrix`: in which order and time environments run, and what is said when one ends red or silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from machines import CONTAINER, ready, table_below

from refgrid.cli import main
from refgrid.commands import campaign as campaign_commands
from refgrid.dataset.definition import load_dataset
from refgrid.environments.campaign import Campaign, definitions_matching, runnable
from refgrid.environments.machine import Machine


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return table_below(tmp_path)


def test_only_means_ops_op_types_definitions_and_globs(
    tmp_path: Path, double: dict[str, Any], writer_below: Any
) -> None:
    write = writer_below(tmp_path)
    for name in ("double_n4", "double_n8", "double_twice_n4"):
        write({**double, "name": name}, 1)
    dataset = load_dataset(tmp_path)
    ops = ("double", "double_twice")

    assert definitions_matching(["double_twice"], dataset, ops) == ["double_twice_n4"]
    assert definitions_matching(["double_n8", "*_n4"], dataset, ops) == ["double_n8", "double_n4", "double_twice_n4"]
    with pytest.raises(ValueError, match=r"'duble' is no op, op_type or definition; near it: double"):
        definitions_matching(["duble"], dataset, ops)
    with pytest.raises(ValueError, match=r"'xyz' is no op.*; legal op_types: double$"):
        definitions_matching(["double", "xyz"], dataset, ops)


class Nox:
    """Stands in for nox: takes a time, ends with a status, and leaves records where it is told to."""

    def __init__(self, results: Path, seconds: float = 0, statuses: Sequence[int] = (), *, silent: str = "") -> None:
        self.results, self.seconds, self.silent = results, seconds, silent
        self.statuses = list(statuses)
        self.now, self.commands = 0.0, list[Sequence[str]]()

    def start(self, command: Sequence[str]) -> int:
        self.commands.append(command)
        self.now += self.seconds
        name = command[2].removeprefix("tests-")
        if name != self.silent:
            self.results.mkdir(parents=True, exist_ok=True)
            header = {"type": "run", "environment": {"name": name}, "started": "2026-11-21T00:00:00+00:00"}
            (self.results / f"{name}-{len(self.commands)}.jsonl").write_text(json.dumps(header) + "\n")
        return self.statuses.pop(0) if self.statuses else 0

    def run(self, table: Path, *options: str, budget: int | None = None) -> tuple[list[str], list[str]]:
        said: list[str] = []
        campaign = Campaign(["nox"], options, self.results, budget, self.start, lambda: self.now)
        return campaign.run(runnable((), ready(table, CONTAINER)), said.append), said


def test_each_environment_is_a_nox_of_its_own_and_a_red_one_stops_none(table: Path, tmp_path: Path) -> None:
    nox = Nox(tmp_path / "local", statuses=[1, 1, 0])

    lost, said = nox.run(table, "-x")

    assert [command[:3] for command in nox.commands] == [
        ["nox", "--session", "tests-cpu"],
        ["nox", "--session", "tests-cu128-old"],
        ["nox", "--session", "tests-over"],
    ]
    assert nox.commands[0][3:] == ["--", "--progress", "--no-header", "--no-summary", "-q", "-x"]
    assert lost == []
    assert len(said) == 3


def test_what_runs_on_the_cpu_for_want_of_a_gpu_says_so(table: Path, tmp_path: Path) -> None:
    nox, said = Nox(tmp_path / "local"), list[str]()
    Campaign(["nox"], (), nox.results, None, nox.start).run(runnable(("cu128",), ready(table, Machine())), said.append)

    assert said[0] == "cu128-old: this machine shows no NVIDIA GPU; on the CPU: nox -s tests-cu128-old"
    assert [command[2] for command in nox.commands] == ["tests-cu128-old"]


def test_an_environment_that_failed_and_recorded_nothing_is_named(table: Path, tmp_path: Path) -> None:
    lost, _ = Nox(tmp_path / "local", statuses=[0, 1, 0], silent="cu128-old").run(table)

    assert lost == ["cu128-old: nox -s tests-cu128-old ended with 1 and recorded nothing"]


def test_an_older_record_does_not_speak_for_a_failed_run(table: Path, tmp_path: Path) -> None:
    Nox(tmp_path / "local").run(table)

    lost, _ = Nox(tmp_path / "local", statuses=[0, 1, 0], silent="cu128-old").run(table)

    assert len(lost) == 1


def test_a_budget_is_shared_by_those_that_are_left(table: Path, tmp_path: Path) -> None:
    nox = Nox(tmp_path / "local", seconds=120)

    nox.run(table, budget=1200)

    assert [command[8] for command in nox.commands] == ["--budget=6m40s", "--budget=9m", "--budget=16m"]


def test_one_environment_alone_has_the_whole_budget(table: Path, tmp_path: Path) -> None:
    nox = Nox(tmp_path / "local")
    Campaign(["nox"], (), nox.results, 1200, nox.start, lambda: 0.0).run(ready(table, Machine())[:1], print)

    assert "--budget=20m" in nox.commands[0]


def test_what_has_no_time_left_is_not_begun_and_named(table: Path, tmp_path: Path) -> None:
    nox = Nox(tmp_path / "local", seconds=700)

    lost, said = nox.run(table, budget=1200)

    assert len(nox.commands) == 2
    assert said[-1] == "over: not begun, the budget of 20m was spent"
    assert lost == []


# A session that needs a moment to account for its cases when it is told to end.
SLOW = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(1)
    pathlib.Path("accounted").touch()
    sys.exit(2)
signal.signal(signal.SIGINT, end)
pathlib.Path("begun").touch()
time.sleep(120)
"""


def test_after_ctrl_c_a_session_may_account_for_its_cases(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    caller = (
        "import signal, sys\nfrom refgrid.environments.campaign import start_and_wait\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "start_and_wait([sys.executable, 'slow.py'])"
    )
    with subprocess.Popen([sys.executable, "-c", caller], cwd=tmp_path, start_new_session=True) as process:
        try:
            while not (tmp_path / "begun").exists():
                assert process.poll() is None
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) != 0
        finally:
            process.kill()

    assert (tmp_path / "accounted").exists()


Refgrid = Callable[..., Result]


@pytest.fixture
def refgrid(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, double: dict[str, Any], write_definition: Any
) -> Refgrid:
    """The command on a laptop: no GPU, one definition, and a nox that notes how it was called."""
    assert table.exists()
    write_definition(double, 1)
    nox = tmp_path / "nox"
    nox.write_text('#!/bin/sh\necho "$@" >> calls\nexit 1\n')
    nox.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(campaign_commands, "look_around", Machine)

    def invoke(*arguments: str) -> Result:
        options = ["--nox", str(nox)] if arguments[0] == "run" else []
        return CliRunner().invoke(main, [*arguments[:1], *options, *arguments[1:]])

    return invoke


def test_the_command_runs_what_it_can_prints_the_matrix_and_tells_of_silence(refgrid: Refgrid, tmp_path: Path) -> None:
    done = refgrid("run", "--only", "double", "--budget", "1h", "-k", "shape", "--maxfail=1")

    assert (tmp_path / "calls").read_text().split() == [
        *("--session", "tests-cpu", "--", "--progress", "--no-header", "--no-summary", "-q", "--budget=1h"),
        *("--definition-name=double_n4", "-k", "shape", "--maxfail=1"),
    ]
    assert done.exit_code == 1
    assert "? over: " in done.output  # the matrix, with what could not run here
    assert "error: cpu: nox -s tests-cpu ended with 1 and recorded nothing" in done.output


def test_the_matrix_decides_where_all_have_recorded(refgrid: Refgrid, tmp_path: Path) -> None:
    (tmp_path / "nox").write_text("#!/bin/sh\nexit 0\n")

    assert refgrid("run").exit_code == 2  # nothing was proven, which is no success


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--environments", "cu999"], "--environments: no environment is called 'cu999'; legal values: cpu, "),
        (["--environments", "over"], "over cannot run here: over: this machine shows no NVIDIA GPU"),
        (["--only", "duble"], "--only: 'duble' is no op, op_type or definition; near it: double"),
        (["--budget", "soon"], "'soon' is no duration; it should be written as 20m, 1h30m or 90s"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(
    refgrid: Refgrid, tmp_path: Path, arguments: list[str], reason: str
) -> None:
    done = refgrid("run", *arguments)

    assert done.exit_code == 2
    assert reason in done.output
    assert not (tmp_path / "calls").exists()


def test_here_says_what_can_run_and_what_has_run(refgrid: Refgrid, tmp_path: Path) -> None:
    local = tmp_path / "results" / "local"
    for started in ("2026-11-20", "2026-11-21"):
        Nox(local).start(["nox", "--session", "tests-cpu"])
        header = {"type": "run", "environment": {"name": "cpu"}, "started": started}
        (local / f"cpu-{started}.jsonl").write_text(json.dumps(header) + "\n")
    (local / "other.jsonl").write_text("no record\n")

    told = {each["name"]: each for each in json.loads(refgrid("here", "--json").output)}

    assert told["cpu"]["here"] is True
    assert told["cpu"]["recorded"].startswith("2026-11-21")
    assert told["cu128-old"] == {
        "name": "cu128-old",
        "session": "tests-cu128-old",
        "kind": "venv",
        "here": False,
        "obstacle": "this machine shows no NVIDIA GPU; on the CPU: nox -s tests-cu128-old",
        "recorded": None,
    }
    assert "this machine shows no" in refgrid("here").output

"""The member's README: what it shows is run as it stands."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from process_ranks import _end, torchrun

README = Path(__file__).resolve().parents[2] / "solutions/README.md"


def shown() -> list[tuple[str, str, str, str]]:
    """The programs, each with the command, the file and what is printed below it."""
    console = r"```console\n\$ (.*?)(\w+\.py)\n(.*?)\n```"
    return re.findall(rf"```python\n(.*?)```\n\n{console}", README.read_text(), re.DOTALL)


def test_each_program_of_the_readme_is_shown_with_what_it_prints() -> None:
    assert [(command, name) for _, command, name, _ in shown()] == [
        ("python3 ", "grouped.py"),
        ("torchrun --standalone --nproc-per-node=2 ", "zigzag.py"),
    ]
    assert README.read_text().count("```python") == len(shown())


def test_the_call_prints_what_the_readme_says(tmp_path: Path) -> None:
    program, _, name, printed = shown()[0]
    (tmp_path / name).write_text(program)
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, name], cwd=tmp_path, env=there, capture_output=True, text=True, check=True)

    assert told.stdout == f"{printed}\n"


def test_the_ranks_print_what_the_readme_says(tmp_path: Path) -> None:
    program, _, name, printed = shown()[1]
    script = tmp_path / name
    script.write_text(program)

    assert printed in torchrun(script, 2).splitlines()


def test_a_rank_that_fails_under_torchrun_is_heard(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nif os.environ['RANK'] == '1':\n    raise SystemExit(sys.argv[1])\n")

    with pytest.raises(AssertionError, match=r"(?s)torchrun of 2 ranks of fails.py ended with 1\n.*the last words"):
        torchrun(script, 2, "the last words")


def test_ranks_that_hang_under_torchrun_are_killed(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\ntime.sleep(600)\n")

    with pytest.raises(
        AssertionError, match=r"torchrun of 1 ranks of hangs\.py ended with nothing within 1 s, so it was"
    ):
        torchrun(script, 1, limit=1)


RANK = "import time; print('here', flush=True); time.sleep(600)"
LAUNCHER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {RANK!r}], start_new_session=True)"


def test_a_rank_with_a_session_of_its_own_ends_with_its_launcher() -> None:
    with subprocess.Popen([sys.executable, "-c", LAUNCHER], stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"here\n"
        (rank,) = psutil.Process(launcher.pid).children()

        _end(launcher.pid)

        assert launcher.stdout.read() == b""  # both ends of the pipe that could still write are closed
    _until_it_has_ended(rank)


def _until_it_has_ended(process: psutil.Process) -> None:
    """A process that was killed closes its files a little before it is gone, or nobody's child but a zombie."""
    deadline = time.monotonic() + 60
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} still runs"
            time.sleep(0.01)

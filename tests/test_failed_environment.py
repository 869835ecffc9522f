"""An environment that cannot be installed: its cases end in `install-fail`, with the installer's words; none is run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refgrid.environments.failed import LONGEST, last_words
from refgrid.records.record import Run, read_runs
from refgrid.report.matrix import build

TESTS = """
from refgrid.contract import ReferenceContract

class TestDoubleN4(ReferenceContract):
    definition_name = "double_n4"

def test_something_else():
    raise AssertionError("nobody owes this")
"""
# What a run of a case would need; importing it is fatal, so none was run.
NO_TORCH = 'raise SystemExit("torch was imported")\n'
PROVIDER = """
class Source:
    name, library, distribution, ops = "sum", "torch", "torch", ("double",)

SOURCES = (Source(),)
"""
LOG = """Using Python 3.12.3 environment at: .nox/tests
Resolved 89 packages in 12ms
Downloading torch (510.0MiB)
 Downloaded torch
\x1b[31merror\x1b[39m: Failed to install: torch-2.11.0.whl (torch==2.11.0)
  cause: No space left on device (os error 28)
"""


@pytest.fixture
def project(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Path:
    write_definition(double, 1, 2)
    (tmp_path / "test_double.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\nfilterwarnings = error\n")
    (tmp_path / "torch.py").write_text(NO_TORCH)
    (tmp_path / "provider.py").write_text(PROVIDER)
    info = tmp_path / "provider-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: provider\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[refgrid.sources]\nprovider = provider\n")
    (tmp_path / "install.log").write_text(LOG)
    return tmp_path


def record(project: Path, verdict: str, *pytest_args: str) -> subprocess.CompletedProcess[str]:
    told = ["--environment", "cu130-made", "--verdict", verdict, "--reason-file", "install.log"]
    command = [
        "-c",
        "from refgrid.cli import main; main()",
        "record-failure",
        *told,
        "--",
        "test_double.py",
        *pytest_args,
    ]
    variables = {**os.environ, "PYTHONPATH": str(project)}
    return subprocess.run(
        [sys.executable, *command], cwd=project, env=variables, capture_output=True, text=True, check=False
    )


def only_run(project: Path) -> Run:
    (run,) = read_runs(project / "results")
    return run


TABLE = """
[[environment]]
name = "cu130-other"
kind = "venv"
python = "3.12"
pins = ["torch==2.11.0"]
cuda = "13.0"
origin = "a test"
exclude-newer = 2026-11-20
"""


def test_a_column_that_nobody_declared_is_refused(project: Path) -> None:
    (project / "ci").mkdir()
    (project / "ci" / "environments.toml").write_text(TABLE)
    done = record(project, "install-fail", "--device", "cpu")

    assert done.returncode == 4
    assert "no environment is called 'cu130-made'; legal values: cu130-other, local" in done.stdout + done.stderr
    assert not (project / "results").exists()


def test_every_case_that_the_run_owes_ends_in_install_fail_with_the_installers_words(project: Path) -> None:
    done = record(project, "install-fail", "--device", "cpu", "-n2", "--dist=load", "--max-worker-restart=9")
    run = only_run(project)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "planned 8 = accounted 8: 8 install-fail" in done.stdout
    assert run.finished
    assert run.header.environment.title == "cu130-made on CPU"
    assert {outcome.verdict.value for outcome in run.accounted()} == {"install-fail"}
    (reason,) = {outcome.reason for outcome in run.accounted()}
    assert "error: Failed to install: torch-2.11.0.whl" in reason
    assert "No space left on device" in reason
    assert "Downloading" not in reason
    assert build([run]).exit_code == 1


def test_no_gpu_is_leased_where_nothing_runs(project: Path) -> None:
    done = record(project, "install-fail", "--device", "cuda", "-n1", "--lease-folder", "/dev/null/leases")

    assert done.returncode == 1, done.stdout + done.stderr
    assert "planned 8 = accounted 8: 8 install-fail" in done.stdout


def test_what_pytest_would_have_left_out_is_not_owed(project: Path) -> None:
    record(project, "install-fail", "--device", "cpu", "-k", "b2")

    assert {case.workload for case in only_run(project).header.planned} == {"b2"}


def test_a_set_that_cannot_be_resolved_is_yellow(project: Path) -> None:
    done = record(project, "unresolvable", "--device", "cpu")

    assert done.returncode == 0, done.stdout + done.stderr
    assert {outcome.verdict.value for outcome in only_run(project).accounted()} == {"unresolvable"}
    assert build([only_run(project)]).exit_code == 2  # nothing was proven


def test_a_run_that_owes_nothing_is_no_success(project: Path) -> None:
    assert record(project, "install-fail", "--definition-name", "triple").returncode not in (0, 1)
    assert not (project / "results").exists()


@pytest.mark.parametrize("verdict", ["match", "cached", "not-run"])
def test_no_other_verdict_can_be_claimed(project: Path, verdict: str) -> None:
    done = record(project, verdict)

    assert (done.returncode, "install-fail" in done.stderr) == (2, True)


def test_words_are_the_last_and_never_missing() -> None:
    many = "".join(f"cause {number}\n" for number in range(500))

    assert last_words(many).endswith("cause 498 cause 499")
    assert len(last_words("x" * 9999)) == LONGEST
    assert last_words(" Downloaded torch\n\n") == "the installer ended without a word"
    assert last_words("a\rb\x1b[2K\n") == "a b"
    assert last_words("# nox -s lock -- x\n# tried 2026-11-21\nBecause of a.\nAnd of b.\n") == "Because of a. And of b."

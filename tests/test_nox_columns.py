"""What the noxfile makes of an environment that cannot be had: a column of the matrix, with the words for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch  # noqa: F401 - the sessions run pytest over cases; conftest.py leaves this file out where there is none
from nox_stand_in import PYTHON, CommandFailed, Session, SessionFailed, checkout, sessions
from small_wheels import make_wheel

from refgrid.overlays.wheelhouse import Cargo, build
from refgrid.records.record import Run, read_runs

Declared = dict[str, Callable[[Session], None]]


@pytest.fixture
def declared(
    tmp_path: Path, double: dict[str, Any], write_definition: Any, monkeypatch: pytest.MonkeyPatch
) -> Declared:
    """The sessions of a checkout with one definition of two workloads, on a machine without a GPU."""
    write_definition(double, 1, 2)
    checkout(tmp_path, version("torch"))
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    monkeypatch.setenv("UV_FIND_LINKS", "wheels")
    places = [place for place in os.environ["PATH"].split(os.pathsep) if not Path(place, "refgrid").exists()]
    monkeypatch.setenv("PATH", os.pathsep.join(places))  # a session has its own venv first, and not that of these tests
    return sessions(tmp_path, monkeypatch)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(tmp_path)


def only_run(root: Path) -> Run:
    (run,) = read_runs(root / "results")
    return run


def column(root: Path) -> tuple[str, str, str]:
    """Environment, verdict and reason of the only run, which are the same for every case."""
    run = only_run(root)
    assert run.finished
    assert len(run.accounted()) == len(run.header.planned) > 0
    ((verdict, reason),) = {(outcome.verdict.value, outcome.reason) for outcome in run.accounted()}
    return run.header.environment.name, verdict, reason


class TestAVirtualEnvironment:
    def test_that_cannot_be_installed_is_a_column_with_the_installers_words(
        self, declared: Declared, session: Session, tmp_path: Path
    ) -> None:
        (tmp_path / "refused").write_text("error: Failed to download `kernels==9`\n  Caused by: no space left\n")

        with pytest.raises(SessionFailed, match="cpu cannot be installed: Command uv pip sync --require-hashes"):
            declared["tests-cpu"](session)

        name, verdict, reason = column(tmp_path)
        assert (name, verdict) == ("cpu", "install-fail")
        assert reason.startswith("error: Failed to download `kernels==9` Caused by: no space left Command uv pip sync")
        assert not session.asked("pytest")

    def test_whose_torch_no_place_serves_says_so(self, declared: Declared, session: Session, tmp_path: Path) -> None:
        (tmp_path / "torch-place").write_text("nowhere")

        with pytest.raises(SessionFailed, match=r"no place serves torch==2\.13\.0"):
            declared["tests-cpu"](session)

        assert column(tmp_path)[1] == "install-fail"
        assert f"no place serves torch==2.13.0 for Python {PYTHON}" in column(tmp_path)[2]
        assert [line.rpartition(": ")[2] for line in session.said if "cannot serve" in line] == [
            "the machine's own wheels in wheels cannot serve this machine",
            "PyTorch's CPU index cannot serve this machine",
            "PyPI's build with its CUDA libraries (about 2.7 GB on Linux) cannot serve this machine",
        ]

    def test_takes_torch_from_the_first_place_that_serves_it(
        self, declared: Declared, session: Session, tmp_path: Path
    ) -> None:
        (tmp_path / "torch-place").write_text("torch-backend=cpu")

        with pytest.raises(CommandFailed, match="Program refgrid not found"):  # the audit: nothing was really installed
            declared["tests-cpu"](session)

        tried = [line.partition(": trying ")[2] for line in session.said if "trying" in line]
        assert tried == ["the machine's own wheels in wheels", "PyTorch's CPU index"]
        assert not (tmp_path / "results").exists()

    def test_that_cannot_be_resolved_is_a_column_and_nothing_is_installed(
        self, declared: Declared, session: Session, tmp_path: Path
    ) -> None:
        (tmp_path / "ci/locks/cpu.unresolvable.txt").write_text("Because kernels==9 was withdrawn, it is impossible.\n")

        declared["tests-cpu"](session)

        assert column(tmp_path) == ("cpu", "unresolvable", "Because kernels==9 was withdrawn, it is impossible.")
        assert "pip sync" not in (tmp_path / "uv-calls").read_text()

    def test_that_is_settled_is_not_installed_again(self, declared: Declared, session: Session, tmp_path: Path) -> None:
        self.answer(tmp_path, "0 of 8 cases are due; written: results/local/x.jsonl")

        declared["tests-cpu"](session)

        assert session.said[-1] == "0 of 8 cases are due; written: results/local/x.jsonl"
        assert not (tmp_path / "uv-calls").exists()
        assert not session.asked("pytest")

    @pytest.mark.parametrize("told", ["8 of 8 cases are due, such as b1", "due: -k: what that leaves", "Traceback"])
    def test_that_is_not_settled_is_installed_audited_and_proven(
        self, declared: Declared, session: Session, tmp_path: Path, told: str
    ) -> None:
        (tmp_path / "torch-place").write_text("torch==")
        self.answer(tmp_path, told)

        declared["tests-cpu"](session)

        calls = (tmp_path / "uv-calls").read_text()
        assert calls.startswith("pip sync --require-hashes ci/locks/cpu.txt\npip install torch==2.13.0 ")
        assert [each for each in ("audit", "pytest") if session.asked(each) == 1] == ["audit", "pytest"]

    def answer(self, root: Path, told: str) -> None:
        """An environment that is installed, and says so when it is asked what is due."""
        for name in ("python", "refgrid"):
            (tool := root / "python/bin" / name).unlink(missing_ok=True)
            tool.write_text(f"#!/bin/sh\ncase \"$*\" in *due*) echo '{told}'; exit 1 ;; esac\n")
            tool.chmod(0o755)


class TestAnOverlay:
    @pytest.fixture
    def wheelhouse(self, tmp_path: Path) -> Path:
        (index := tmp_path / "index").mkdir()
        wheel = make_wheel(index, "kernels", {"kernels/__init__.py": b""})
        machine = (f"torch=={version('torch')}",)
        build([Cargo("over", PYTHON, machine, (), (wheel,), ())], tmp_path / "wheelhouse", 10**6)
        return tmp_path / "wheelhouse"

    def test_that_is_damaged_is_a_column_with_the_words_of_the_program_that_lays_it(
        self, declared: Declared, session: Session, tmp_path: Path, wheelhouse: Path
    ) -> None:
        (wheelhouse / "part-01.tar").write_bytes(b"")

        with pytest.raises(SessionFailed, match="over cannot be installed: Command python3 "):
            declared["tests-over"](session)

        name, verdict, reason = column(tmp_path)
        assert (name, verdict) == ("over", "install-fail")
        assert reason.startswith("error: wheelhouse/part-01.tar is damaged: sha256 ")
        assert not session.asked("pytest")

    def test_that_is_absent_is_a_column_too(self, declared: Declared, session: Session, tmp_path: Path) -> None:
        absent = "wheelhouse: no wheelhouse is here; where there is an index: nox -s wheelhouse -- over"

        with pytest.raises(SessionFailed, match=f"over cannot be installed: {absent}"):
            declared["tests-over"](session)

        assert column(tmp_path) == ("over", "install-fail", absent)

    def test_that_is_asked_for_something_else_fails_and_records_nothing(
        self, declared: Declared, tmp_path: Path
    ) -> None:
        warming = Session(tmp_path, "--warm")

        with pytest.raises(CommandFailed, match="no wheelhouse is here"):
            declared["tests-over"](warming)

        assert "no wheelhouse is here" in warming.said[-1]
        assert not (tmp_path / "results").exists()

    @pytest.mark.usefixtures("wheelhouse")
    def test_is_laid_and_proven_once_and_a_second_session_starts_no_pytest(
        self, declared: Declared, tmp_path: Path
    ) -> None:
        first, second = Session(tmp_path), Session(tmp_path)
        declared["tests-over"](first)
        before = only_run(tmp_path)
        laid = (site := tmp_path / ".nox/.cache/overlays/over/kernels").stat().st_ino

        declared["tests-over"](second)

        assert {outcome.verdict.value for outcome in before.accounted()} == {"match", "no-ground-truth"}
        assert before.header.environment.name == "over"
        assert (first.asked("pytest"), second.asked("pytest")) == (1, 0)
        assert "cases are due, such as" in first.said[-1]
        assert f"0 of {len(before.header.planned)} cases are due; written: " in second.said[-1]
        assert site.stat().st_ino == laid

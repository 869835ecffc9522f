"""What is said of a worker that died: from its journal, from faulthandler's last words and from how it ended."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from refgrid.overlays.overlay import CACHES
from refgrid.proving.deaths import innermost_frame
from refgrid.records.record import Verdict
from refgrid.running.journal import Entry, death, last_entry, last_words, open_folder
from refgrid.running.libraries import cut_short

MAIN = 0x7F0123456789
ENTRY = Entry("gw3", 4711, MAIN, "NVIDIA H200 GPU-a", "gemm_n1-b1-shape", "2026-11-21T12:00:00+00:00")
WHOSE = "[worker gw3, process 4711, case begun 2026-11-21T12:00:00+00:00]"
FATAL = """Fatal Python error: Segmentation fault

Current thread 0x00007f0000000001 (most recent call first):
  File "/lib/kernel.py", line 12 in launch
  File "/lib/pytest.py", line 1 in call

Thread 0x00007f0123456789 (most recent call first):
  File "/lib/wait.py", line 3 in wait
"""
TIMEOUT = """Timeout (0:10:00)!
Thread 0x00007f0000000001 (most recent call first):
  File "/lib/execnet.py", line 5 in read

Thread 0x00007f0123456789 (most recent call first):
  File "<reference of gemm_n1>", line 4 in run
  File "/lib/pytest.py", line 1 in call
"""


@pytest.mark.parametrize(
    ("words", "status", "verdict", "reason"),
    [
        pytest.param(
            TIMEOUT,
            1,
            Verdict.HANG,
            "not done within 10m (--case-timeout), then in run at <reference of gemm_n1>:4",
            id="hang",
        ),
        pytest.param(
            FATAL,
            -11,
            Verdict.CRASH,
            "the worker crashed: killed by SIGSEGV in launch at /lib/kernel.py:12",
            id="signal",
        ),
        pytest.param(
            FATAL,
            None,
            Verdict.CRASH,
            "the worker crashed: Segmentation fault in launch at /lib/kernel.py:12",
            id="words",
        ),
        pytest.param(
            "",
            -9,
            Verdict.CRASH,
            "the worker crashed: killed by SIGKILL, as the kernel does when memory runs out",
            id="killed",
        ),
        pytest.param("", -60, Verdict.CRASH, "the worker crashed: killed by signal 60", id="a signal without a name"),
        pytest.param("", 13, Verdict.CRASH, "the worker crashed: ended with status 13", id="status"),
        pytest.param("", None, Verdict.CRASH, "the worker crashed: ended without a word", id="nothing is known"),
    ],
)
def test_a_death_has_a_verdict_and_a_reason(words: str, status: int | None, verdict: Verdict, reason: str) -> None:
    assert death(ENTRY, words, status, 600) == (verdict, f"{reason} on NVIDIA H200 GPU-a {WHOSE}")


def test_without_a_gpu_none_is_named() -> None:
    assert death(replace(ENTRY, device=""), "", 13, 600)[1] == f"the worker crashed: ended with status 13 {WHOSE}"


def test_libraries_that_may_be_the_reason_are_named() -> None:
    _, reason = death(ENTRY, "", -7, 600, [Path("/cache/norm.so")])

    assert "killed by SIGBUS on NVIDIA H200 GPU-a; cut short: /cache/norm.so [" in reason


def test_the_innermost_frame_is_that_of_the_thread_that_died_else_of_the_main_one() -> None:
    assert innermost_frame(FATAL, MAIN) == "launch at /lib/kernel.py:12"
    assert innermost_frame(TIMEOUT, MAIN) == "run at <reference of gemm_n1>:4"
    assert innermost_frame(TIMEOUT, 1) == ""
    assert innermost_frame("", MAIN) == ""


def test_a_journal_is_read_after_its_process_has_gone(tmp_path: Path) -> None:
    write = """
import os, sys
from pathlib import Path
from refgrid.running.journal import Journal
journal = Journal(Path(sys.argv[1]), "gw0", "a GPU")
journal.begin("a-first-case-with-a-longer-name")
journal.end()
journal.begin("second")
os.abort()
"""
    process = subprocess.Popen([sys.executable, "-c", write, str(tmp_path)], stderr=subprocess.PIPE)
    process.communicate(timeout=60)

    entry = last_entry(tmp_path, "gw0")

    assert entry
    assert (entry.pid, entry.device, entry.running) == (process.pid, "a GPU", "second")
    assert entry.ended == "a-first-case-with-a-longer-name"
    assert last_words(tmp_path, "gw0").startswith("Fatal Python error: Aborted")
    assert innermost_frame(last_words(tmp_path, "gw0"), entry.main_thread) == "<module> at <string>:9"


def test_a_worker_that_never_began_a_case_left_nothing(tmp_path: Path) -> None:
    assert last_entry(tmp_path, "gw0") is None
    (tmp_path / "gw0.journal").touch()  # made, and nothing written: the disk was full
    assert last_entry(tmp_path, "gw0") is None
    assert last_words(tmp_path, "gw0") == ""


def test_libraries_that_are_cut_short_are_found_in_every_cache(tmp_path: Path) -> None:
    whole = Path(__import__("pydantic_core")._pydantic_core.__file__).read_bytes()
    for name, content in {
        "whole": whole,
        "cut": whole[:-1],
        "head": whole[:40],
        "empty": b"",
        "text": b"x" * 99,
        "damaged": whole[:-99] + bytes([whole[-99] ^ 1]) + whole[-98:],  # whose length says nothing
    }.items():
        folder = tmp_path / {"cut": "triton", "head": "tvm-ffi"}.get(name, "flashinfer") / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.so").write_bytes(content)
    caches = {variable: str(tmp_path / folder) for variable, folder in CACHES.items()}

    assert {path.stem for path in cut_short(caches)} == {"cut", "head", "empty", "text"}
    assert cut_short({"TORCH_EXTENSIONS_DIR": str(tmp_path / "nowhere")}) == []


class TestTheFolderOfARun:
    def test_is_its_own_until_it_is_closed(self, tmp_path: Path) -> None:
        one, other = tmp_path / ".running-one", tmp_path / ".running-other"
        with open_folder(one), open_folder(other):
            assert one.is_dir()
            assert other.is_dir()

    def test_goes_with_the_next_run_when_its_owner_is_gone(self, tmp_path: Path) -> None:
        open_folder(tmp_path / ".running-killed").close()  # what the kernel does for a process that was killed
        (tmp_path / ".running-killed" / "gw0.journal").write_text("{}")
        (tmp_path / ".running-unlike").mkdir()  # no run made it so

        with open_folder(tmp_path / ".running-next"):
            assert sorted(path.name for path in tmp_path.iterdir()) == [".running-next", ".running-unlike"]

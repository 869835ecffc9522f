"""Compiling ahead: every module is built or named with the compiler's words, on no more compilers than allowed."""

from __future__ import annotations

import io
import os
import subprocess
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from packaging.version import Version
from rich.console import Console

from refgrid.sources import KernelModule
from refgrid.warming import compiler_slots as slots
from refgrid.warming.progress import display, short
from refgrid.warming.warm import Built, Progress, compile_modules, first_errors


class Busy:
    """How many builds run at once, at the most, in all and in each folder."""

    def __init__(self) -> None:
        self._lock, self.now, self.most = threading.Lock(), dict[Path, int](), dict[Path, int]()
        self.total = self.most_in_all = 0

    def enter(self, folder: Path, by: int) -> None:
        with self._lock:
            self.now[folder] = self.now.get(folder, 0) + by
            self.total += by
            self.most[folder] = max(self.most.get(folder, 0), self.now[folder])
            self.most_in_all = max(self.most_in_all, self.total)


@dataclass(frozen=True)
class Fake:
    """A module whose compiler writes its file, or fails with these words."""

    name: str
    folder: Path
    sources: int = 1
    fault: str = ""
    silent: bool = False
    busy: Busy = field(default_factory=Busy)
    started: list[str] = field(default_factory=list)

    @property
    def library(self) -> Path:
        return self.folder / self.name / f"{self.name}.so"

    def compile(self) -> None:
        self.busy.enter(self.folder, 1)
        self.started.append(self.name)
        time.sleep(0.02)
        self.busy.enter(self.folder, -1)
        if self.fault:
            raise RuntimeError(self.fault)
        if not self.library.exists() and not self.silent:
            self.library.parent.mkdir(parents=True, exist_ok=True)
            self.library.write_bytes(b"machine code")


def build(
    *modules: KernelModule, jobs: int = 2, slot: AbstractContextManager[object] | None = None
) -> dict[str, Built]:
    return {each.name: each for each in compile_modules(modules, jobs, slot or nullcontext(), Progress())}


def test_what_is_missing_is_compiled_and_what_is_there_is_not(tmp_path: Path) -> None:
    first = build(Fake("a", tmp_path), Fake("b", tmp_path))
    again = build(Fake("a", tmp_path), Fake("c", tmp_path))

    assert [first["a"].compiled, first["b"].compiled] == [True, True]
    assert [again["a"].compiled, again["c"].compiled] == [False, True]
    assert not any(each.error for each in (*first.values(), *again.values()))


def test_a_module_that_fails_is_named_with_the_first_errors_and_stops_no_other(tmp_path: Path) -> None:
    words = "Ninja build failed.\n[1/2] nvcc a.cu -DERROR=error\nFAILED: a.o\na.cu(7): error: no such thing\nmore\n"

    built = build(Fake("a", tmp_path, fault=words), *(Fake(name, tmp_path) for name in "bcd"))

    assert built["a"].error == "a.cu(7): error: no such thing"
    assert [built[name].error for name in "bcd"] == ["", "", ""]


def test_a_compiler_that_leaves_no_file_has_failed(tmp_path: Path) -> None:
    assert "is not there" in build(Fake("a", tmp_path, silent=True))["a"].error


def test_the_largest_begin_first(tmp_path: Path) -> None:
    started: list[str] = []
    modules = [Fake(name, tmp_path, sources=size, started=started) for name, size in (("s", 1), ("l", 9), ("m", 5))]

    build(*modules, jobs=1)

    assert started == ["l", "m", "s"]


def test_in_one_folder_no_two_build_at_once_in_several_they_do(tmp_path: Path) -> None:
    busy = Busy()
    folders = [tmp_path / "shared"] * 4 + [tmp_path / "x", tmp_path / "y"]

    build(*(Fake(str(i), folder, busy=busy) for i, folder in enumerate(folders)), jobs=6)

    assert busy.most[tmp_path / "shared"] == 1
    assert busy.most_in_all > 1


def test_an_interrupt_starts_no_further_build(tmp_path: Path) -> None:
    class Interrupted(Progress):
        def ended(self, built: Built) -> None:  # noqa: ARG002
            raise KeyboardInterrupt

    started: list[str] = []
    modules = [Fake(str(i), tmp_path, started=started) for i in range(50)]

    with pytest.raises(KeyboardInterrupt):
        compile_modules(modules, 1, nullcontext(), Interrupted())

    assert len(started) < 10


HEADER = "x.cu:1: fatal error: cublasLt.h: No such file"
LINKER = "/usr/bin/ld: cannot find -lcuda\ncollect2: error: ld returned 1 exit status"


@pytest.mark.parametrize(
    ("output", "told"),
    [
        pytest.param(f"[1/9] nvcc -Werror x\n  {HEADER}\nnote\n", HEADER, id="header"),
        pytest.param(LINKER, LINKER, id="linker"),
        pytest.param("a\nb\nc\nd\n", "b\nc\nd", id="no error is spoken of"),
        pytest.param("e1 error\ne2 error\ne3 error\ne4 error", "e1 error\ne2 error\ne3 error", id="three suffice"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_of_a_compilers_words_the_first_about_an_error_are_kept(output: str, told: str) -> None:
    assert first_errors(output) == told


# ---- slots


def busiest(count: int, ninja: str) -> int:
    """The most that hold a slot at once, of eight who want one."""
    busy = Busy()
    with slots.compiler_slots(count, Version(ninja)) as slot:

        def work() -> None:
            with slot:
                busy.enter(Path(), 1)
                time.sleep(0.02)
                busy.enter(Path(), -1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return busy.most_in_all


def test_as_many_hold_a_slot_as_there_are_compilers() -> None:
    assert busiest(3, "1.13.2") == 3


def test_an_older_ninja_gets_all_compilers_for_itself() -> None:
    assert busiest(3, "1.11.1") == 1


def test_ninja_is_told_how_many_compilers_there_are_and_afterwards_all_is_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MAX_JOBS", "99")  # it would keep ninja from sharing
    monkeypatch.delenv("MAKEFLAGS", raising=False)

    with slots.compiler_slots(3, Version("1.13.0")):
        assert "MAX_JOBS" not in os.environ
        assert os.environ["MAKEFLAGS"].startswith(" -j3 --jobserver-auth=fifo:")
    with slots.compiler_slots(3, Version("1.12")):
        assert os.environ["MAX_JOBS"] == "3"

    assert os.environ["MAX_JOBS"] == "99"
    assert "MAKEFLAGS" not in os.environ


NINJA = """
rule count
  command = sh -c 'mkdir busy.$$$$; ls -d ../*/busy.* | wc -l >> ../most; sleep 0.2; rmdir busy.$$$$; touch $out'
{builds}
"""


def test_real_ninjas_share_the_compilers(tmp_path: Path) -> None:
    ninja = slots.ninja_version()
    if ninja is None or ninja < Version("1.13"):
        pytest.skip(f"ninja {ninja} knows no jobserver; 1.13 does")
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
        (folder / "build.ninja").write_text(NINJA.format(builds="".join(f"build {i}.o: count\n" for i in range(4))))

    def run(folder: Path, slot: AbstractContextManager[object]) -> None:
        with slot:
            subprocess.run(["ninja", "-C", folder], check=True, capture_output=True)

    with slots.compiler_slots(2, ninja) as slot:
        threads = [threading.Thread(target=run, args=(folder, slot)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert max(map(int, (tmp_path / "most").read_text().split())) == 2
    assert all((folder / f"{i}.o").exists() for folder in folders for i in range(4))


@pytest.mark.parametrize(
    ("gigabytes", "limit", "used", "cores", "fit"),
    [
        pytest.param(64, "max", "0", 16, 15, id="memory"),
        pytest.param(640, "max", "0", 16, 16, id="cores"),
        pytest.param(640, str(12 * 2**30), str(2**30), 16, 2, id="container"),
        pytest.param(1, "max", "0", 16, 1, id="one in any case"),
    ],
)
def test_compilers_are_bound_by_cores_and_memory(
    gigabytes: int, limit: str, used: str, cores: int, fit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = type("Memory", (), {"available": gigabytes * 2**30})
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    for name, text in (("_LIMIT", limit), ("_USED", used)):
        monkeypatch.setattr(slots, name, tmp_path / name)
        (tmp_path / name).write_text(text)

    assert slots.compilers_that_fit() == fit


def test_without_ninja_there_is_no_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    assert slots.ninja_version() is None


# ---- what is shown


def shown(tmp_path: Path, *, terminal: bool) -> str:
    told = io.StringIO()
    console = Console(file=told, force_terminal=terminal, width=200)
    modules = [Fake("good", tmp_path), Fake("bad", tmp_path, fault="x.cu(1): error: wrong"), Fake("old", tmp_path)]
    modules[2].compile()
    with display(len(modules), 2, console) as watching:
        compile_modules(modules, 2, nullcontext(), watching)
    return told.getvalue()


def test_without_a_terminal_each_module_has_a_plain_line(tmp_path: Path) -> None:
    told = shown(tmp_path, terminal=False)

    assert told.splitlines()[0] == "3 modules, up to 2 compilers at once"
    assert [line.split()[1] for line in told.splitlines() if "/3" in line].count("compiled") == 1
    assert "failed" in told
    assert "x.cu(1): error: wrong" in told
    assert "was there" in told
    assert "\x1b" not in told


def test_on_a_terminal_the_lines_stay_too(tmp_path: Path) -> None:
    told = shown(tmp_path, terminal=True)

    assert "3/3" in told
    assert "\x1b" in told


def test_a_long_name_keeps_the_end_that_tells_it_apart() -> None:
    name = "batch_prefill_with_kv_cache_dtype_q_bf16_head_dim_vo_128_posenc_0_use_swa_False_f16qk_False_sm90"

    assert short(name).endswith("f16qk_False_sm90")
    assert len(short(name)) == 44
    assert short("rope") == "rope"

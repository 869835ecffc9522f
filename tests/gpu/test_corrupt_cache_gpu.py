"""FlashInfer's own module, compiled and then cut short: who needs it says so, and warming up mends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from refgrid.records.record import Outcome, read_runs

ROOT = Path(__file__).parents[2]
DEFINITION = "rope_with_cos_sin_cache_neox_style_d128_rd64"
NEEDING = {"flashinfer", "agreement"}  # the checks of a workload that load FlashInfer's module


class Cache:
    """A cache of its own, into which the environment's rope was compiled; one that came compiled cannot be cut."""

    def __init__(self, base: Path) -> None:
        self.variables = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(base)}
        self.python("refgrid", "warm", "--op-type", "rope")
        (self.library,) = base.rglob("rope.so")
        self.whole = self.library.stat().st_size
        os.truncate(self.library, self.whole // 2)

    def python(self, *arguments: str) -> str:
        """What the command says; it may end as it likes."""
        told = [sys.executable, "-m", *arguments]
        done = subprocess.run(told, cwd=ROOT, env=self.variables, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr)  # noqa: T201 - what is wrong on a machine that is hard to come by
        return done.stdout

    def outcomes(self, results: Path) -> Mapping[str, Outcome]:
        """Of a run of one definition, in a process that may die, by case."""
        plugins = [f"-p{name}" for name in ("xdist.plugin", "refgrid.plugin")]
        crash_safe = ["--dist=load", "--max-worker-restart=10000", "-pno:cacheprovider", "-n1"]
        asked = ["--device=cuda", f"--definition-name={DEFINITION}", "--test-sizes=small", f"--results={results}"]
        self.python("pytest", "-q", *plugins, *crash_safe, *asked, "tests/references/test_rope.py")
        (run,) = read_runs(results)
        return dict(run.outcomes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache(tmp_path_factory.mktemp("cache") / "flashinfer")


@pytest.fixture(scope="module")
def cut(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Outcome]:
    return cache.outcomes(tmp_path_factory.mktemp("cut"))


def test_each_case_that_needs_the_module_names_it(cache: Cache, cut: Mapping[str, Outcome]) -> None:
    guilty = [outcome for outcome in cut.values() if outcome.case.id.rsplit("-", 1)[1] in NEEDING]

    assert {outcome.verdict.value for outcome in guilty} <= {"crash", "error"}
    assert [outcome.reason for outcome in guilty if cache.library.name not in outcome.reason] == []
    assert guilty


def test_every_other_case_matches(cut: Mapping[str, Outcome]) -> None:
    others = {name: o.verdict.value for name, o in cut.items() if name.rsplit("-", 1)[1] not in NEEDING}

    assert others
    assert set(others.values()) == {"match"}, others


@pytest.mark.usefixtures("cut")
def test_warming_anew_compiles_it_and_all_match(cache: Cache, tmp_path: Path) -> None:
    said = cache.python("refgrid", "warm", "--op-type", "rope")
    mended = cache.outcomes(tmp_path)

    assert f"cut short, so it is compiled again: {cache.library}" in said
    assert cache.library.stat().st_size > cache.whole // 2
    assert {outcome.verdict.value for outcome in mended.values()} == {"match"}

"""The probe of a process's CUDA context, against a torch that is only a name. Real runs are in test_faults and gpu/."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from refgrid.proving.deaths import cuda_fault
from refgrid.running.grid import made_to_stay
from refgrid.running.worker import share_cores


class OutOfMemoryError(RuntimeError):
    """Known by its name, as torch's is."""


def torch_whose(
    synchronize: Exception | None = None, zeros: Exception | None = None, *, initialized: bool = True
) -> SimpleNamespace:
    def fail_with(error: Exception | None) -> Any:
        if error:
            raise error
        return SimpleNamespace(item=lambda: 0.0)

    cuda = SimpleNamespace(is_initialized=lambda: initialized, synchronize=lambda: fail_with(synchronize))
    return SimpleNamespace(cuda=cuda, zeros=lambda *_, **__: fail_with(zeros))


ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with TORCH_USE_CUDA_DSA")


@pytest.mark.parametrize(
    ("torch", "told"),
    [
        pytest.param(None, "", id="never imported"),
        pytest.param(SimpleNamespace(), "", id="half imported"),
        pytest.param(torch_whose(ILLEGAL, initialized=False), "", id="CUDA was never used"),
        pytest.param(torch_whose(), "", id="all is well"),
        pytest.param(torch_whose(ILLEGAL), "CUDA error: an illegal memory access was encountered", id="lost"),
        pytest.param(
            torch_whose(None, ILLEGAL), "CUDA error: an illegal memory access was encountered", id="lost late"
        ),
        pytest.param(torch_whose(RuntimeError()), "RuntimeError", id="lost without a word"),
        pytest.param(torch_whose(None, OutOfMemoryError("CUDA out of memory")), "", id="full is not lost"),
    ],
)
def test_the_probe_tells_a_lost_context_from_a_full_gpu(
    monkeypatch: pytest.MonkeyPatch, torch: SimpleNamespace | None, told: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch", torch) if torch else monkeypatch.delitem(sys.modules, "torch", False)

    assert cuda_fault() == told


@pytest.mark.parametrize(
    ("cores", "workers", "threads"),
    [
        pytest.param(8, "2", "4", id="an equal part each"),
        pytest.param(2, "3", "1", id="more workers than cores"),
        pytest.param(8, None, "8", id="the only process"),
        pytest.param(None, "2", "1", id="nobody knows how many"),
    ],
)
def test_workers_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int | None, workers: str | None, threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    if workers:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    share_cores()

    assert os.environ["OMP_NUM_THREADS"] == threads


def test_who_has_said_how_many_threads_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    share_cores()

    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_workers_of_these_tests_share_the_cores_too(request: pytest.FixtureRequest) -> None:
    """A test file imports torch long before a case is proven, and torch asks only then for how many threads."""
    if not hasattr(request.config, "workerinput"):
        pytest.skip("the only process has all cores")

    threads = int(os.environ["OMP_NUM_THREADS"])

    torch = sys.modules.get("torch")  # other test files bring it, where it is
    assert torch is None or torch.get_num_threads() == threads


def test_tests_of_solutions_start_where_the_instrument_is_not_installed() -> None:
    """As on a GPU machine without an index: `PYTHONPATH=solutions/src python3 -m pytest -n 2 tests/gpu/...`."""
    hidden = "import sys, types; sys.modules.update(refgrid=None, pydantic=None)"
    started = "import conftest; conftest.pytest_configure(types.SimpleNamespace(workerinput={}))"

    subprocess.run([sys.executable, "-c", f"{hidden}; {started}"], check=True, cwd=Path(__file__).parent)


def test_what_is_made_to_stay_is_not_looked_through_and_garbage_is_taken_again_afterwards() -> None:
    frozen = gc.get_freeze_count()

    def imports() -> None:
        with made_to_stay():
            assert not gc.isenabled()
            raise ImportError

    try:
        with pytest.raises(ImportError):
            imports()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()

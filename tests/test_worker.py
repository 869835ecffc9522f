"""The probe of a process's CUDA context, against a torch that is only a name. Real runs are in test_faults and gpu/."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from refgrid.proving.deaths import cuda_fault


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

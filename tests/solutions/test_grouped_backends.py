"""Every backend on the CPU, by the checks that run on a GPU too; PyTorch's kernels and fa3-fwd's stood in for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from grouped_checks import CHECKS, Subject, layouts
from varlen_kernels import Calls, varlen_kernels

from refgrid_solutions.grouped_attention import backends
from refgrid_solutions.grouped_attention.backends import aten, fa3
from refgrid_solutions.grouped_attention.predicted import CALLS, COPIES

LAYOUTS = layouts(8)
WAYS = {"torch by copies": ("torch", COPIES), "torch by calls": ("torch", CALLS), "fa3": ("fa3", COPIES)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """The kernels of a GPU on this CPU, and a table and backends that take it for one."""
    for name in ("torch", "fa3"):
        row = backends.TABLE[name]
        here = backends.Row(row.module, row.says, devices=("cpu",), dtypes=(torch.bfloat16, torch.float32))
        monkeypatch.setitem(backends.TABLE, name, here)
    for module in (aten, fa3):
        monkeypatch.setattr(module, "refuses", lambda _: "")
    monkeypatch.setattr(fa3, "_processors", lambda _: 132)
    monkeypatch.setattr(fa3, "_KERNELS", "torch")
    with varlen_kernels() as launched:
        yield launched


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference(layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], Subject("reference"))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_what_kernels_are_told(way: str, layout: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, predicted = WAYS[way]
    for module in (aten, fa3):
        monkeypatch.setattr(module, "faster_way", lambda _: predicted)

    CHECKS[check](LAYOUTS[layout], Subject(backend))

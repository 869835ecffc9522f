"""What a calibration measures with torch at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.calibration.measure import Measurer
from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.sources import Sources
from refgrid_groundtruth import Unavailable

ROOT = Path(__file__).resolve().parents[1]


def test_what_breaks_is_told_with_its_seed_and_what_is_not_there_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = Measurer(load_dataset(ROOT), Sources(), "cpu")
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "shape")
    found = measurer._bench.truth

    def truth(laid: Any, case: Case, source: str) -> Any:
        if source == "torch":
            raise torch.OutOfMemoryError("out of memory")
        if source == "transformers":
            raise Unavailable("missing", "transformers is not installed")
        return found(laid, case, source)

    monkeypatch.setattr(measurer._bench, "truth", truth)
    measurer.measure(case, range(3))

    told = [place for place in measurer.absent if place.startswith(("torch", "transformers"))]
    assert sorted(told) == [
        f"torch, {case.name}",
        f"torch, {case.name}-seed1",
        f"torch, {case.name}-seed2",
        f"transformers, {case.name}",
    ]

"""What a calibration measures with torch at hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.calibration import measure
from refgrid.calibration.measure import Measurer
from refgrid.calibration.run import Plan, _dataset
from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.proving.outputs import same_bits
from refgrid.sources import NoReferee, Sources
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


def test_a_draw_that_cannot_be_judged_costs_no_other_and_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    measurer = Measurer(load_dataset(ROOT), Sources(), "cpu")
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "shape")
    found = measurer._bench.referee

    def referee(laid: Any) -> Any:
        if laid.key.endswith("/1"):
            raise NoReferee("70 GiB for it, and 9 GiB are free")
        return found(laid)

    monkeypatch.setattr(measurer._bench, "referee", referee)
    measurer.measure(case, range(3))

    assert {len(draws) for draws in measurer.draws.values()} == {2}
    told = "error: NoReferee: 70 GiB for it, and 9 GiB are free"
    assert measurer.absent[f"reference, {case.name}-seed1"] == told


def test_a_gpu_draws_the_definitions_as_they_are() -> None:
    on = {device: _dataset(Plan(ROOT, device, 1)).definitions for device in ("cpu", "cuda")}

    assert {name for name, held in on["cuda"].items() if held.name != name} == set()
    assert {name for name, held in on["cpu"].items() if held.name != name}


def test_on_a_gpu_forty_draws_share_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "shape")

    def are_the_same(device: str) -> list[bool]:
        """The weights of some draws and those before them, drawn on the CPU as on that device."""
        monkeypatch.setattr(measure, "_SHARING", {"cpu": sharing[device]})
        bench = Measurer(load_dataset(ROOT), Sources(), "cpu")._bench
        drawn: list[Any] = [bench.lay(replace(case, seed=seed)).inputs.tensors["weight"] for seed in (39, 40, 41)]
        return [same_bits(*pair) for pair in pairwise(drawn)]

    sharing = dict(measure._SHARING)

    assert are_the_same("cpu") == [False, False]
    assert are_the_same("cuda") == [False, True]

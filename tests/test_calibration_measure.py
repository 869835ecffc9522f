"""What a calibration measures with torch at hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.calibration import measure
from refgrid.calibration.chosen import HEAVY, SHARING
from refgrid.calibration.measure import Measurer
from refgrid.calibration.rounding import FORMULA
from refgrid.calibration.run import Plan, _dataset, _tasks
from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.dataset.memory import weight_bytes
from refgrid.proving.inputs import drawing
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


INDEXER = Case(
    "dsa_topk_indexer_fp8_h64_d128_topk2048_ps64", "dsa_paged", "dsa_topk_indexer_fp8", "edge_b2_m32_p1", "shape"
)


def scores_of(monkeypatch: pytest.MonkeyPatch, off: float) -> dict[tuple[str, str], float]:
    """The largest errors of scores by who and against whom, where a source's law is off by so much."""
    measurer = Measurer(load_dataset(ROOT), Sources(), "cpu")
    found = measurer._bench.truth

    def truth(laid: Any, case: Case, source: str) -> Any:
        return {name: law + off for name, law in found(laid, case, source).items()}

    monkeypatch.setattr(measurer._bench, "truth", truth)
    measurer.measure(INDEXER, range(2))

    assert {(each.dtype, each.output, len(draws)) for each, draws in measurer.draws.items()} == {
        ("float32", "topk_indices", 2)
    }
    return {(each.who, each.against): max(draw.abs for draw in draws) for each, draws in measurer.draws.items()}


def test_chosen_indices_are_measured_by_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scores_of(monkeypatch, 0.0)

    assert 0 < found["reference", "float64"] < 1e-5
    assert found["reference", "oracle"] == found["reference", "float64"] == found[FORMULA, "float64"]
    assert found["oracle", "float64"] == 0


def test_scores_that_are_off_are_measured_as_far_off(monkeypatch: pytest.MonkeyPatch) -> None:
    found = scores_of(monkeypatch, 0.5)

    assert found["oracle", "float64"] == pytest.approx(0.5)
    assert found["reference", "oracle"] == pytest.approx(0.5, abs=1e-5)


def test_a_gpu_draws_the_definitions_as_they_are() -> None:
    on = {device: _dataset(ROOT, device).definitions for device in ("cpu", "cuda")}

    assert {name for name, held in on["cuda"].items() if held.name != name} == set()
    assert {name for name, held in on["cpu"].items() if held.name != name}


MIXTURES = tuple(op for op in Sources().ops if "moe" in op)


@pytest.mark.parametrize("op", MIXTURES)
def test_a_gpu_draws_mixtures_of_experts_at_their_own_sizes_with_few_tokens(op: str) -> None:
    definitions = load_dataset(ROOT).definitions
    tasks = _tasks(Plan(ROOT, "cuda", 240, (op,)))

    assert sorted(seed for task in tasks for seed in task.seeds) == list(range(240))
    for task in tasks:
        held = definitions[task.case.definition]
        constants = {name: axis.value for name, axis in held.axes.items() if axis.value is not None}
        assert weight_bytes(held) > HEAVY
        assert constants.items() <= task.axes.items()
        assert 1 < task.axes["seq_len"] <= 33


def test_a_gpu_draws_groups_of_experts_that_flashinfers_router_takes() -> None:
    definitions = load_dataset(ROOT).definitions
    tasks = _tasks(Plan(ROOT, "cuda", 240, ("moe_fp8_block_scale_ds_routing",)))

    assert {definitions[task.case.definition].constant("n_group") for task in tasks} == {8}


def test_draws_that_share_weights_are_a_task_and_on_a_cpu_all_of_a_workload() -> None:
    on = {device: _tasks(Plan(ROOT, device, 100, ("rmsnorm",))) for device in ("cpu", "cuda")}
    workloads = {task.case.id for task in on["cpu"]}

    assert [len(task.seeds) for task in on["cpu"]] == [34, 33, 33]
    assert len(on["cuda"]) == 9
    assert all(len({seed // SHARING["cuda"] for seed in task.seeds}) == 1 for task in on["cuda"])
    for case in workloads:
        seeds = [[seed for task in tasks if task.case.id == case for seed in task.seeds] for tasks in on.values()]
        assert seeds[0] == seeds[1]


def test_ops_are_measured_in_the_order_that_they_are_asked_for_in_else_the_heaviest_first() -> None:
    def ops(*asked: str) -> list[str]:
        return list(dict.fromkeys(task.name for task in _tasks(Plan(ROOT, "cuda", 240, asked))))

    assert ops("rmsnorm", "gemm") == ["rmsnorm", "gemm"]
    assert ops("gemm", "rmsnorm") == ["gemm", "rmsnorm"]
    assert ops()[0] == "trtllm_fp4_block_scale_moe_topk1"


def test_a_process_that_waits_holds_no_weights() -> None:
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "shape")
    measurer = Measurer(load_dataset(ROOT), Sources(), "cpu")
    measurer._bench.lay(case)
    assert drawing._kept

    measurer.measure(case, range(1))

    assert not drawing._kept


def test_on_a_gpu_forty_draws_share_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("rmsnorm_h128", "rmsnorm", "rmsnorm", "b4", "shape")

    def are_the_same(device: str) -> list[bool]:
        """The weights of some draws and those before them, drawn on the CPU as on that device."""
        monkeypatch.setattr(measure, "SHARING", {"cpu": sharing[device]})
        bench = Measurer(load_dataset(ROOT), Sources(), "cpu")._bench
        drawn: list[Any] = [bench.lay(replace(case, seed=seed)).inputs.tensors["weight"] for seed in (39, 40, 41)]
        return [same_bits(*pair) for pair in pairwise(drawn)]

    sharing = dict(SHARING)

    assert are_the_same("cpu") == [False, False]
    assert are_the_same("cuda") == [False, True]

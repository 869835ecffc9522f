"""Memory: what a case takes, what a worker may take, and the sizes that a workload is cut to where it does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from refgrid.dataset import memory, smaller
from refgrid.dataset.case import Case
from refgrid.dataset.constraint import Constraint
from refgrid.dataset.definition import Axis, DataSet, Definition, TensorSpec, Workload, load_dataset
from refgrid.proving.finding import Finding
from refgrid.proving.inputs import Inputs
from refgrid.proving.workbench import Laid, Workbench
from refgrid.records.record import Verdict
from refgrid.running.grid import Grid
from refgrid.running.units import bytes_of
from refgrid.sources import Sources

GIB, MIB = 2**30, 2**20


def definition(*constraints: str) -> Definition:
    """Paged attention in small: weights of 4 MiB, pages of 1 KiB, rows of 2 KiB in and out."""
    var = ("num_seqs", "len_indptr", "num_tokens", "num_indices", "num_pages")
    axes = {name: Axis("var") for name in var} | {"d": Axis("const", 1024), "page": Axis("const", 512)}
    inputs = {
        "q": TensorSpec(("num_tokens", "d"), "bfloat16"),
        "cache": TensorSpec(("num_pages", "page"), "bfloat16"),
        "indptr": TensorSpec(("len_indptr",), "int32"),
        "indices": TensorSpec(("num_indices",), "int32"),
        "weight": TensorSpec(("d", "d"), "float32"),
    }
    outputs = {"output": TensorSpec(("num_tokens", "d"), "bfloat16")}
    return Definition("op_d1024", "op", axes, inputs, outputs, "", ("len_indptr == num_seqs + 1", *constraints))


AXES = {"num_seqs": 16, "len_indptr": 17, "num_tokens": 16, "num_indices": 2757, "num_pages": 989669}


def fitted(made: Definition, limit: float, **axes: int) -> dict[str, int]:
    asked = made.axis_values({**AXES, **axes})
    found = smaller.fitted(made, asked, lambda axes: memory.bytes_needed(made, axes) <= limit)
    return {name: found[name] for name in AXES}


class TestNeeded:
    def test_weights_and_inputs_count_twice_outputs_three_times_and_the_work_of_the_reference(self) -> None:
        made = replace(definition(), constraints=())
        axes = {"num_seqs": 0, "len_indptr": 1, "num_tokens": 1, "num_indices": 1, "num_pages": 3}
        inputs, outputs = 2 * 1024 + 3 * 2 * 512 + 4 + 4, 2 * 1024

        needed = memory.bytes_needed(made, made.axis_values(axes))

        assert needed == 2 * (4 * 2**20 + inputs) + 3 * outputs + 4 * (inputs + outputs)

    def test_the_work_on_a_large_cache_is_bounded(self) -> None:
        made = definition()
        grown = made.axis_values({**AXES, "num_pages": 2**24})

        assert memory.bytes_needed(made, grown) < 2 * memory.growing_bytes(made, grown) + 2.1 * GIB

    @pytest.mark.parametrize(("dtype", "size"), [("float64", 8), ("float32", 4), ("bfloat16", 2), ("float8_e4m3fn", 1)])
    def test_bytes_follow_the_dtype(self, dtype: Any, size: int) -> None:
        made = replace(definition(), inputs={"weight": TensorSpec(("d", "d"), dtype)}, constraints=())

        assert memory.weight_bytes(made) == size * 2**20


class TestFree:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        memory._free_on_cpu.cache_clear()
        yield
        memory._free_on_cpu.cache_clear()

    def test_workers_share_a_cpus_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GIB))
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "4")

        assert memory.bytes_free("cpu") == 3 * GIB
        assert memory.bytes_free("cpu", 2 * GIB) == 2 * GIB

    def test_what_a_worker_holds_is_not_taken_off_its_share(self, monkeypatch: pytest.MonkeyPatch) -> None:
        left = iter((12 * GIB, 1 * GIB))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=next(left)))
        monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)

        assert memory.bytes_free("cpu") == memory.bytes_free("cpu") == 12 * GIB

    @pytest.mark.parametrize(
        ("workers", "free", "held", "expected"),
        [
            pytest.param(1, 139, 0, 125.1, id="alone: all but what contexts and workspaces take"),
            pytest.param(5, 60, 0, 25.2, id="an even share, though more is free at the moment"),
            pytest.param(5, 10, 8, 16.2, id="no more than is free and what its allocator holds, but for workspaces"),
            pytest.param(1, 121, 0, 108.9, id="alone, others not gone yet: 120 GiB do not fit into 121"),
        ],
    )
    def test_workers_share_a_gpu(
        self, monkeypatch: pytest.MonkeyPatch, workers: int, free: float, held: float, expected: float
    ) -> None:
        import torch

        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "8")  # on all GPUs together
        monkeypatch.setenv("REFGRID_WORKERS_ON_GPU", str(workers))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GIB, 140 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held * GIB)

        assert memory.bytes_free("cuda") == pytest.approx(expected * GIB)


class TestBytes:
    @pytest.mark.parametrize(
        ("text", "count"),
        [
            ("2GiB", 2 * GIB),
            ("512MiB", 512 * MIB),
            ("1.5 gib", 1.5 * GIB),
            ("64KiB", 65536),
            ("1000000", 1e6),
            ("7B", 7),
        ],
    )
    def test_are_read_in_binary_units(self, text: str, count: float) -> None:
        assert memory.parse_bytes(text) == count

    @pytest.mark.parametrize("text", ["", "lots", "2GB", "-1", "0", "0MiB", "2 GiB free", "GiB", "1e9", "nan", "inf"])
    def test_anything_else_is_refused_with_what_it_should_be(self, text: str) -> None:
        with pytest.raises(ValueError, match="should be such as 2GiB, 512MiB") as caught:
            memory.parse_bytes(text)

        assert repr(text) in str(caught.value)

    def test_are_told_in_the_unit_that_reads_best(self) -> None:
        assert [memory.told_bytes(n) for n in (0, 1023, 1536, 3 * MIB, 11.2 * GIB)] == [
            *("0 B", "1023 B", "1.5 KiB", "3.0 MiB", "11.2 GiB")
        ]


class TestCut:
    def test_what_fits_stays_as_it_is(self) -> None:
        assert fitted(definition(), math.inf) == AXES

    def test_the_axis_that_carries_the_bytes_is_cut_and_the_others_stay(self) -> None:
        found = fitted(definition(), 256 * MIB)

        assert found == {**AXES, "num_pages": 989669 >> 5}
        assert smaller.told_changes(smaller.changes(AXES, found)) == "num_pages 989669 -> 30927"

    def test_sequences_and_their_row_starts_stay_related(self) -> None:
        found = fitted(definition(), 16 * MIB, num_seqs=4096, len_indptr=4097, num_tokens=4096, num_pages=4096)

        assert found["num_seqs"] < 4096
        assert found["len_indptr"] == found["num_seqs"] + 1

    def test_an_axis_never_falls_below_one_that_it_was_not_smaller_than(self) -> None:
        found = fitted(definition(), 10 * MIB)

        assert found["num_pages"] >= found["num_indices"] >= found["num_tokens"] >= found["num_seqs"] >= 1

    def test_constraints_on_axes_hold_on_the_way(self) -> None:
        found = fitted(definition("num_pages % 7 == 0"), 256 * MIB, num_pages=7 * 2**17)

        assert (found["num_pages"] % 7, found["num_pages"]) == (0, 7 * 2**12)

    def test_a_size_that_cannot_be_cut_says_so(self) -> None:
        with pytest.raises(smaller.CannotShrink, match="the smallest size that the constraints allow"):
            fitted(definition("num_pages >= 900000"), 256 * MIB)

        with pytest.raises(smaller.CannotShrink):
            fitted(definition(), 8 * MIB)  # twice the weights

    def test_the_reason_tells_weights_from_a_size_that_constraints_keep_large(self) -> None:
        assert memory.told_lack(definition(), 7 * MIB) == (
            "weights of 4.0 MiB are held 2 times, as drawn and as handed out; 7.0 MiB are free for this worker"
        )
        assert "the smallest size that the constraints allow does not fit" in memory.told_lack(definition(), 64 * MIB)

    def test_a_forbidden_size_is_refused_with_the_constraint_and_its_values(self) -> None:
        made = definition("num_tokens >= num_seqs")

        with pytest.raises(ValueError, match="'num_tokens >= num_seqs' does not hold") as caught:
            smaller.demand_allowed(made, made.axis_values({**AXES, "num_tokens": 2}), "b16_t2")

        for told in ("op_d1024.json", "num_tokens = 2", "num_seqs = 16", "workload b16_t2"):
            assert told in str(caught.value)


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(Path(__file__).resolve().parents[1])


@pytest.mark.parametrize("limit", [2 * GIB, 64 * MIB], ids=["2GiB", "64MiB"])
def test_every_workload_of_this_data_set_that_is_cut_keeps_its_shape(dataset: DataSet, limit: float) -> None:
    cut = 0
    for made in dataset.definitions.values():
        var = [name for name, axis in made.axes.items() if axis.type == "var"]
        for workload in dataset.workloads[made.name]:
            asked = made.axis_values(workload.axes)
            try:
                found = smaller.fitted(made, asked, _fits(made, limit))
            except smaller.CannotShrink:
                continue
            cut += found != asked
            assert memory.bytes_needed(made, found) <= limit
            assert [found[name] for name in var if not min(1, asked[name]) <= found[name] <= asked[name]] == []
            assert [text for text in made.constraints if _broken(text, found)] == []
            crossed = [(a, b) for a in var for b in var if asked[a] >= asked[b] and found[a] + 1 < found[b]]
            assert crossed == [], f"{made.name} {workload.uuid}"
    assert cut > 50


def _fits(made: Definition, limit: float) -> Callable[[dict[str, int]], bool]:
    return lambda axes: memory.bytes_needed(made, axes) <= limit


def _broken(text: str, axes: dict[str, int]) -> str:
    constraint = Constraint(text)
    return constraint.fault(axes) if set(constraint.names) <= set(axes) else ""


class TestRoomOnAGpu:
    """What a library takes beside what is held, and what a worker leaves to another; no GPU is here."""

    class Asked(Exception):
        """What the library does here."""

    def asked(self) -> None:
        raise self.Asked

    @pytest.fixture
    def bench(self) -> Workbench:
        table = tuple(SimpleNamespace(name=name, ops=("op",)) for name in ("lib", "oracle"))
        provider: Any = SimpleNamespace(SOURCES=table, REFEREE="oracle", adapter=lambda *_: self.asked)
        return Workbench(DataSet(Path(), {}, {}), Sources((provider,)), "cuda")

    @pytest.mark.parametrize(
        ("source", "width", "more", "asked"),
        [
            pytest.param("lib", 2**14, 1.9 * GIB, False, id="no"),
            pytest.param("lib", 2**14, 2 * GIB, True, id="it does"),
            pytest.param("oracle", 2**14, 0, True, id="the oracle goes through them as they are"),
            pytest.param("lib", 2**10, 0, True, id="small ones are among what workspaces are left"),
        ],
    )
    def test_a_library_is_asked_only_where_its_own_copy_of_the_weights_fits(
        self, bench: Workbench, source: str, width: int, more: float, monkeypatch: pytest.MonkeyPatch, *, asked: bool
    ) -> None:
        small = definition()
        weight = TensorSpec(("d", "d"), "float64")
        made = replace(small, axes={**small.axes, "d": Axis("const", width)}, inputs={**small.inputs, "weight": weight})
        case = Case(made.name, "op", "op", "w", "numerics", source)
        laid: Any = Laid("key", "op", made, made.axis_values(AXES), Inputs({}, ""), {})
        free = memory.bytes_needed(made, laid.axes) + more
        monkeypatch.setattr(memory, "bytes_free", lambda *_: free)

        if asked:
            with pytest.raises(self.Asked):
                bench.call_truth(laid, case, source)
            return
        with pytest.raises(Finding) as caught:
            bench.call_truth(laid, case, source)
        assert caught.value.verdict is Verdict.NOT_RUN
        assert str(caught.value).startswith("lib may lay weights of 2.0 GiB out once more, beside two copies")
        assert f"{memory.told_bytes(free)} are free for this worker" in str(caught.value)

    def test_the_copy_decides_whether_a_case_runs_alone(self) -> None:
        made, workload = definition(), Workload("w", AXES, {})
        case = Case(made.name, "op", "op", "w", "shape")

        found = bytes_of(DataSet(Path(), {made.name: made}, {made.name: (workload,)}), case)

        assert found == memory.bytes_needed(made, made.axis_values(AXES)) + 4 * MIB

    @pytest.mark.parametrize(("held", "left"), [(5 * GIB, True), (3 * GIB, False)])
    def test_who_waits_for_one_that_runs_alone_leaves_it_much_memory_and_keeps_little(
        self, bench: Workbench, held: int, monkeypatch: pytest.MonkeyPatch, *, left: bool
    ) -> None:
        import torch

        cleared: list[bool] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: held)
        monkeypatch.setattr(bench, "clear", lambda: cleared.append(True))

        bench.lighten()

        assert cleared == [True] * left

    def test_who_has_proven_nothing_yet_holds_nothing_and_imports_no_torch_for_it(self) -> None:
        nothing: Any = SimpleNamespace()
        grid, asked = Grid(nothing), list[bool]()

        grid.lighten()
        assert "prover" not in vars(grid)
        vars(grid)["prover"] = SimpleNamespace(lighten=lambda: asked.append(True))
        grid.lighten()

        assert asked == [True]

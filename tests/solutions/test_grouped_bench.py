"""What times grouped attention: that its ways compute one thing, that its numbers say what they say."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from click.testing import CliRunner
from grouped_bench import pace as pace_module
from grouped_bench import planning, traffic
from grouped_bench import shapes as shapes_module
from grouped_bench import ways as ways_module
from grouped_bench.__main__ import main
from grouped_bench.parallel import parallel_ways
from grouped_bench.report import Row, markdown, plot, read, write_csv
from grouped_bench.shapes import Shape, prefixes, shapes, shared, zigzag
from grouped_bench.timing import Times, in_turns
from grouped_bench.ways import backward_ways, forward_ways, problem

from refgrid_solutions.grouped_attention import CAUSAL, FULL

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TINY = Shape("tiny", "zigzag", "8B", 64, (4, 2), ((0, 8, 0, 16, CAUSAL), (8, 16, 0, 56, CAUSAL)), 4, 1)


def tiny() -> ways_module.Problem:
    return problem(TINY, CPU, torch.float32)


@pytest.mark.parametrize("rank", range(4))
@pytest.mark.parametrize("stride", [0, 1])
def test_a_rank_and_the_algorithm_that_it_comes_from_compute_the_same(rank: int, stride: int) -> None:
    of = problem(replace(zigzag("8B", 64, 4, rank), heads=(4, 2), stride=stride), CPU, torch.float32)

    ways, _ = parallel_ways(of, ["reference"])

    results = [call() for call in ways.values()]
    assert list(ways) == [f"reference: {way}" for way in ("grouped", "a call for each chunk", "the origin's algorithm")]
    torch.testing.assert_close(results[1:], results[:1] * 2)


def test_a_shape_of_one_rank_is_no_context_parallelism() -> None:
    assert parallel_ways(problem(prefixes(2, 4, (4, 2)), CPU, torch.float32), ["reference"]) == ({}, {})


@pytest.mark.parametrize("make", [forward_ways, backward_ways])
def test_the_ways_of_a_shape_compute_the_same(make: object) -> None:
    ways, refused = make(tiny(), ["reference"])  # type: ignore[operator] # either of two functions

    one, other = ways["reference: grouped"](), ways["reference: launches in order"]()
    torch.testing.assert_close(one, other)
    assert not refused.keys() - {"flashinfer"}
    assert ways["reference: dense, as many FLOPs"]().isfinite().all()


def test_a_way_to_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways_module, "_in_order", lambda of, _: lambda: torch.zeros_like(of.q))

    with pytest.raises(ValueError, match=r"reference: launches in order and reference: grouped differ by"):
        forward_ways(tiny(), ["reference"])


def test_a_backend_that_cannot_run_is_named_with_its_reason() -> None:
    ways, refused = forward_ways(problem(TINY, CPU), ["fa3", "reference"])

    assert list(refused) == ["fa3", "flashinfer"]
    assert refused["fa3"]
    assert refused["flashinfer"] == "device = cpu, but should be on cuda"
    assert all(name.startswith("reference") for name in ways)


def test_the_dense_call_has_as_many_visible_pairs() -> None:
    of = tiny()
    plan = of.plan(TINY.pieces)
    dense = ways_module._dense_problem(of, plan)

    assert dense.plan(dense.shape.pieces).forward_flops == pytest.approx(plan.forward_flops, rel=0.03)


@pytest.fixture
def naive_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's formulas in place of its CUDA kernels."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", _forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", _backward)


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object) -> tuple[torch.Tensor, torch.Tensor]:
    scores, _, values = _scores(q, k, v, causal=others[5] is True)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values), scores.logsumexp(-1)


def _backward(dout: torch.Tensor, *saved: Any) -> list[torch.Tensor]:
    """Of one launch's share of rows whose out and lse are those of all launches."""
    q, k, v, out, lse, *others = saved
    scores, keys, values = _scores(q, k, v, causal=others[5] is True)
    weights = (scores - lse[..., None]).exp()
    through = torch.einsum("qhd,khd->hqk", dout, values) - (dout * out).sum(-1).t()[..., None]
    steps = weights * through / math.sqrt(dout.shape[2])
    dq = torch.einsum("hqk,khd->qhd", steps, keys)
    wide = (torch.einsum("hqk,qhd->khd", each, rows) for each, rows in ((steps, q), (weights, dout)))
    return [dq, *(each.unflatten(1, (k.shape[1], -1)).sum(2) for each in wide)]


def _scores(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys, values = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(q.shape[2])
    hidden = torch.ones(len(q), len(k), dtype=torch.bool).triu(1 + len(k) - len(q))
    return scores.masked_fill(hidden & torch.tensor(causal), -math.inf), keys, values


@pytest.mark.usefixtures("naive_flash")
@pytest.mark.parametrize("make", [forward_ways, backward_ways])
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_a_context_parallel_rank_computes_the_same(world: int, rank: int, make: Callable[..., Any]) -> None:
    """The shards, the masks, the merge and where gradients go are the way's own."""
    of = problem(zigzag("8B", 64, world, rank), CPU, torch.float32)
    way = ways_module._context_parallel

    found = (way(of) if make is forward_ways else ways_module._both(of, way))()

    torch.testing.assert_close(found, make(of, ["reference"])[0]["reference: grouped"]())


def test_key_bytes_are_those_of_the_union_and_of_every_read() -> None:
    each = 4 * 128 * 8

    assert zigzag("8B", 4096, 8, 7).key_bytes == (each * 9 * 256, each * 17 * 256)
    assert shared(16, 4, 65536).key_bytes == (each * 65536, 16 * each * 65536)
    assert prefixes(2, 10, (8, 2)).key_bytes == (each // 4 * 20, each // 4 * 30)


def test_names_of_shapes_are_their_own_and_no_slice_is_empty() -> None:
    names = [shape.name for shape in shapes()]

    assert len(set(names)) == len(names)
    assert all(piece[0] < piece[1] and piece[2] < piece[3] for shape in shapes() for piece in shape.pieces)


def test_a_speedup_is_the_median_over_rounds_and_lies_where_it_says() -> None:
    fast, slow = Times((1.0, 1.0, 2.0, 1.0, 1.0)), Times((2.0, 2.0, 2.0, 2.0, 2.1))

    median, low, high = fast.speedup(slow)

    assert (median, fast.median, fast.spread) == (2.0, 1.0, (1.0, 2.0))
    assert low <= 2.0 <= high <= 2.1
    assert slow.speedup(fast)[0] == 0.5


def test_every_way_has_a_turn_in_every_round() -> None:
    counts = {"one": 0, "other": 0}

    def call(name: str) -> None:
        counts[name] += 1

    times = in_turns({name: lambda name=name: call(name) for name in counts}, CPU, rounds=3)  # type: ignore[misc] # its own name

    assert {name: len(each.rounds) for name, each in times.items()} == {"one": 3, "other": 3}
    assert min(counts.values()) >= 3


def test_a_call_that_fills_a_sample_is_warmed_once_and_one_that_does_not_is_repeated() -> None:
    counts = {"long": 0, "short": 0}

    def call(name: str, seconds: float) -> None:
        counts[name] += 1
        time.sleep(seconds)

    in_turns({"long": lambda: call("long", 0.01), "short": lambda: call("short", 0)}, CPU, rounds=3)

    assert counts["long"] == 1 + 1 + 3  # to warm it, to see how long it takes, and a round each
    assert counts["short"] > counts["long"]


GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("products", "best", "told"),
    [
        pytest.param([700, 690], 720, None, id="as ever"),
        pytest.param(
            [700, 340], 0, "ran at 700 TFLOP/s before and at 340 after, but should at 560", id="slowed meanwhile"
        ),
        pytest.param([340, 700], 0, "ran at 340 TFLOP/s before", id="slow at first"),
        pytest.param([340, 350], 700, "best was 700", id="slow all the time"),
        pytest.param([340, 350], 0, None, id="nothing to compare with"),
    ],
)
def test_times_of_a_slow_gpu_are_not_kept(
    products: list[float], best: float, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []

    def product(_: object) -> float:
        done.append(products[len(done)])
        return done[-1]

    def work() -> Iterator[Row]:
        assert len(done) == 1, "timed between the two"
        yield {"way": "fa3: grouped"}

    monkeypatch.setattr(pace_module, "product_tflops", product)
    earlier: list[Row] = [
        {"device": "a GPU", "matmul_tflops": best},
        {"device": "a GPU"},
        {"device": "B", "matmul_tflops": 1e4},
    ]
    pace = pace_module.Pace(earlier, GPU, "a GPU")

    if told is None:
        assert pace.kept(work) == [{"way": "fa3: grouped", "matmul_tflops": min(products)}]
    else:
        with pytest.raises(pace_module.SlowGpu, match=told):
            pace.kept(work)


def test_a_later_pass_is_held_to_the_best_of_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    products = iter([700.0, 700.0, 340.0, 340.0])
    monkeypatch.setattr(pace_module, "product_tflops", lambda _: next(products))
    pace = pace_module.Pace([], GPU, "a GPU")

    assert pace.kept(list) == []
    with pytest.raises(pace_module.SlowGpu, match="best was 700"):
        pace.kept(list)


def test_a_product_of_matrices_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "_SIZE", 64)

    assert 0 < pace_module.product_tflops(CPU) < 10


class Figure:
    """matplotlib's, as far as the plot goes; that is not part of what tests install."""

    drawn: ClassVar[dict[str, list[tuple[int, float]]]] = {}

    def __init__(self, **_: object) -> None:
        self.drawn.clear()

    def subplots(self, *_: int, **__: object) -> SimpleNamespace:
        return SimpleNamespace(flat=[self] * 4)

    def plot(self, tokens: tuple[int, ...], tflops: tuple[float, ...], *, label: str, **style: str) -> list[str]:
        assert style.keys() == {"color", "linestyle", "marker"}
        self.drawn[label] = list(zip(tokens, tflops, strict=True))
        return [label]

    def legend(self, *, handles: list[str], **_: object) -> None:
        assert sorted(handles) == sorted(self.drawn)

    def set(self, **_: object) -> None: ...

    def set_xscale(self, *_: object, **__: object) -> None: ...

    def set_xticks(self, ticks: list[int], labels: list[str]) -> None:
        assert len(ticks) == len(labels)

    def set_ylim(self, **_: object) -> None: ...

    def savefig(self, file: Path, **_: object) -> None:
        file.write_bytes(b"a plot")


@pytest.fixture(autouse=True)
def figure(monkeypatch: pytest.MonkeyPatch) -> type[Figure]:
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", made := ModuleType("matplotlib.figure"))
    vars(made)["Figure"] = Figure
    return Figure


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shapes_module, "shapes", lambda: iter([TINY]))
    monkeypatch.setattr(planning, "_ROUNDS", 2)
    arguments = ["--device", "cpu", "--backends", "fa3,reference", "--rounds", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert re.search(r"plan of 64 groups, reference: plan \d+\.\d{3} ms", said)
    assert "1 of 3 tiny, forward: reference: grouped eager" in said
    return tmp_path


def test_a_run_writes_what_it_measured_and_what_it_did_not(measured: Path) -> None:
    with (measured / "grouped.csv").open() as file:
        lines = list(csv.DictReader(file))
    told = (measured / "grouped.md").read_text()

    grouped = [line for line in lines if line["way"] == "reference: grouped" and line["pass"] == "forward"]
    assert [line["over"] for line in grouped] == [
        "",
        "reference: launches in order",
        "reference: dense, as many FLOPs",
    ]
    assert "## reference, zigzag, forward, eager\n" in told
    assert "| over launches in order | over dense, as many FLOPs |" in told
    assert "## Not run\n\n- fa3, in 1 shapes: " in told


def test_what_fails_is_named_and_the_rest_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes_module, "shapes", lambda: iter([TINY]))
    monkeypatch.setattr(ways_module, "_in_order", lambda of, name: lambda: torch.zeros_like(of.q) * len(name))

    arguments = ["--device", "cpu", "--backends", "reference", "--rounds", "2", "--output", str(tmp_path)]
    done = CliRunner().invoke(main, arguments)

    assert done.exit_code == 1
    assert "ValueError: reference: launches in order and reference: grouped differ by" in " ".join(done.output.split())
    assert "not measured: tiny, forward" in done.output
    assert {row["pass"] for row in read(tmp_path / "grouped.ndjson")} == {"planning", "context parallel"}


def test_masks_are_those_of_the_module() -> None:
    assert (shapes_module.FULL, shapes_module.CAUSAL) == (FULL, CAUSAL)


def test_shapes_come_in_the_order_in_which_they_are_asked_for() -> None:
    said = CliRunner().invoke(main, ["--list", "--shapes", "imbalanced-*", "--shapes", "*-w8-r7", "--shapes", "*"])

    names = said.output.splitlines()
    assert names[:2] == ["imbalanced-100-9900", "zigzag-8B-4K-w8-r7"]
    assert sorted(names) == sorted(shape.name for shape in shapes())


def test_what_was_measured_is_not_measured_again(measured: Path) -> None:
    before = (measured / "grouped.ndjson").read_text()

    arguments = ["--device", "cpu", "--backends", "fa3,reference", "--output", str(measured)]
    CliRunner().invoke(main, arguments, catch_exceptions=False)

    assert (measured / "grouped.ndjson").read_text() == before


def test_a_shape_whose_bytes_were_counted_is_still_timed(measured: Path) -> None:
    file = measured / "grouped.ndjson"
    counted = {"shape": "tiny", "kind": "zigzag", "pass": "forward", "mode": "bytes", "way": "reference: grouped"}
    bytes_read = {"key_bytes": 1, "key_reads": 2, "read_bytes": 3}
    file.write_text(json.dumps({**counted, **bytes_read}) + "\n")

    arguments = ["--device", "cpu", "--backends", "reference", "--rounds", "2", "--output", str(measured)]
    CliRunner().invoke(main, arguments, catch_exceptions=False)

    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {"bytes", "eager"} <= {row["mode"] for row in rows if row["pass"] == "forward"}


def test_tables_and_plot_follow_from_the_rows_alone(tmp_path: Path, figure: type[Figure]) -> None:
    shape = {
        "kind": "zigzag",
        "model": "8B",
        "rounds": 11,
        "world": 8,
        "rank": 7,
        "stride": 0,
        "pass": "forward",
        "mode": "graph",
    }
    speedups = {"fa3: launches in order": (1.25, 1.2, 1.3), "torch: grouped": (2.0, 2.0, 2.0)}
    times = {"median_ms": 1.0, "lowest_ms": 0.9, "highest_ms": 1.1}
    time = {"way": "fa3: grouped", **times, "tflops": 600.0, "speedups": speedups}
    rows: list[Row] = [{"shape": f"z{tokens}", "tokens": tokens, **shape, **time} for tokens in (4096, 8192)]

    plot([*rows, {**rows[0], "rank": 0}], tmp_path / "plot.png")
    assert figure.drawn == {"fa3: grouped": [(4096, 600.0), (8192, 600.0)]}
    write_csv(rows, tmp_path / "rows.csv")

    assert "| shape | ms | TFLOP/s | over launches in order |\n" in markdown(rows)
    assert "`PyTorch: context parallel` is this benchmark's own writing of what PyTorch launches" in markdown(rows)
    assert "Not timed" not in markdown(rows, ["z4096"])
    assert markdown(rows, ["z4096", "z1", "z2"]).endswith("\n## Not timed: 2 of 4 shapes\n\nz1, z2\n")
    assert "| z4096 | 1.000 (0.900 to 1.100) | 600 | 1.25 [1.20, 1.30] |" in markdown(rows)
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 7
    assert json.dumps(rows)


def test_rendering_measures_nothing_and_adds_the_plot(measured: Path) -> None:
    before = (measured / "grouped.ndjson").read_text()

    done = CliRunner().invoke(main, ["--render", "--output", str(measured)], catch_exceptions=False)

    assert done.output == f"written: {measured}/grouped.csv, grouped.md, goals.md, grouped.png\n"
    assert (measured / "grouped.ndjson").read_text() == before
    assert (measured / "grouped.png").read_bytes() == b"a plot"


def test_rendering_what_was_never_measured_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--render", "--output", str(tmp_path)])

    assert done.exit_code == 2
    assert f"{tmp_path / 'grouped.ndjson'} is not there: measure first" in " ".join(done.output.split())


def test_a_pattern_without_a_shape_is_refused() -> None:
    done = CliRunner().invoke(main, ["--shapes", "nothing-*"])

    assert done.exit_code == 2
    assert "--shapes 'nothing-*' is none; --list tells them" in done.output


def ncu(tmp_path: Path, printed: str, code: int = 0) -> list[str]:
    """A program in ncu's place, which runs nothing."""
    program = tmp_path / "ncu.py"
    program.write_text(f"import sys\nsys.stdout.write({printed!r})\nsys.exit({code})\n")
    return [sys.executable, str(program)]


COUNTED = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","attend","dram__bytes_read.sum","byte","1,234,567"
"1","combine","dram__bytes_read.sum","byte","433"
==PROF== Disconnected
"""


def test_bytes_are_those_of_all_kernels(tmp_path: Path) -> None:
    assert traffic.bytes_read("tiny", "fa3: grouped", ncu(tmp_path, COUNTED)) == 1235000


@pytest.mark.parametrize(
    ("printed", "code"), [("==ERROR== no permission\n", 1), ("==PROF== no kernels were profiled\n", 0), (COUNTED, 9)]
)
def test_a_profiler_that_counts_nothing_is_heard(printed: str, code: int, tmp_path: Path) -> None:
    words = rf"ended with {code} and \d kernels: {re.escape(printed.strip().splitlines()[-1])}"

    with pytest.raises(RuntimeError, match=words):
        traffic.bytes_read("tiny", "fa3: grouped", ncu(tmp_path, printed, code))


def test_bytes_have_a_table_and_what_was_not_counted_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"fa3: grouped": 5_000_000}
    monkeypatch.setattr(shapes_module, "shapes", lambda: iter([TINY]))
    monkeypatch.setattr(traffic, "bytes_read", lambda _, way: found.get(way) or no_permission())

    done = CliRunner().invoke(main, ["--bytes", "--backends", "fa3", "--output", str(tmp_path)])
    again = CliRunner().invoke(main, ["--bytes", "--backends", "fa3", "--output", str(tmp_path)])

    assert done.exit_code == again.exit_code == 1
    assert "tiny, fa3: grouped: 5.0 MB read\n" in done.output
    assert "tiny, fa3: grouped" not in again.output
    assert "tiny, fa3: launches in order: no permission\n" in done.output
    assert "not measured: tiny, fa3: launches in order\n" in done.output
    told = (tmp_path / "grouped.md").read_text()
    assert "| shape | k and v once | k and v for every slice | fa3: grouped |\n" in told
    assert "| tiny | 0.1 | 0.1 | 5.0 |\n" in told


def no_permission() -> int:
    raise RuntimeError("no permission")

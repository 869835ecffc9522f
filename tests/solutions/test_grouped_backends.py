"""Every backend on the CPU, by the checks that run on a GPU too; PyTorch's kernels and fa3-fwd's stood in for."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grouped_checks import CHECKS, LARGE, check_compiled
from grouped_layouts import FULL, Layout, Subject, drawn, layouts, planned, run_both, zigzag
from grouped_planning import check_planning
from varlen_kernels import Calls, backends_of_a_gpu

from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func
from refgrid_solutions.grouped_attention.backends import aten, fa3
from refgrid_solutions.grouped_attention.predicted import CALLS, COPIES, faster_way, splits

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = layouts(8)
WAYS = {"torch by copies": ("torch", COPIES), "torch by calls": ("torch", CALLS), "fa3": ("fa3", COPIES)}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    with backends_of_a_gpu(monkeypatch) as launched:
        yield launched


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference(layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], Subject("reference", head_dim=16))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith("sampled")])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", WAYS)
def test_what_kernels_are_told(way: str, layout: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, predicted = WAYS[way]
    for module in (aten, fa3):
        monkeypatch.setattr(module, "faster_way", lambda _: predicted)

    CHECKS[check](LAYOUTS[layout], Subject(backend, head_dim=16))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("check", LARGE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "torch", "fa3"])
def test_inputs_ten_times_as_large(backend: str, dtype: torch.dtype, check: str) -> None:
    LARGE[check](LAYOUTS["zigzag"], Subject(backend, dtype=dtype, head_dim=128))


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize("backend", ["reference", "torch", "fa3"])
def test_every_backend_is_compiled(backend: str) -> None:
    check_compiled(LAYOUTS["both masks"], Subject(backend), "aot_eager")


@pytest.mark.usefixtures("calls")
def test_a_plan_that_is_not_ready_breaks_a_graph_in_two_or_is_refused() -> None:
    subject = Subject("torch")
    plans = [planned(LAYOUTS["zigzag"], subject) for _ in range(2)]
    told = drawn(LAYOUTS["zigzag"], subject)

    def step(plan: Any) -> torch.Tensor:
        return grouped_flash_attn_func(*told, plan, backend="torch")[0] * 2

    found = torch.compile(step, backend="aot_eager")(plans[0])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"call plan.prepare\(backend\) before"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(plans[1])

    assert torch.equal(found, step(plans[0]))


@pytest.mark.parametrize("backend", ["torch", "fa3"])
@pytest.mark.usefixtures("calls")
def test_many_groups_are_no_more_operations_than_few(backend: str) -> None:
    check_planning(Subject(backend))


def launched(calls: Calls, layout: str, backend: str, **options: Any) -> list[str]:
    """What a forward and a backward pass launch."""
    run_both(LAYOUTS[layout], Subject(backend), **options)
    return list(calls)


@pytest.mark.parametrize(
    ("layout", "masks", "slices"),
    [("zigzag", 1, 2), ("sixteen prefixes", 1, 16), ("both masks", 2, 3), ("nothing", 0, 0)],
)
def test_one_launch_a_mask_and_backward_by_copies_or_calls(
    layout: str, masks: int, slices: int, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    for way, count in ((COPIES, masks), (CALLS, slices)):
        monkeypatch.setattr(aten, "faster_way", lambda _, way=way: way)
        del calls[:]

        assert launched(calls, layout, "torch") == ["aten forward"] * masks + ["aten backward, in any order"] * count


def test_determinism_is_asked_of_the_backward_kernel_and_of_nothing_else(calls: Calls) -> None:
    assert launched(calls, "one causal", "torch", deterministic=True)[1:] == ["aten backward, deterministic"]
    assert not torch.are_deterministic_algorithms_enabled()


def test_determinism_that_was_asked_for_stays(calls: Calls) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        told = launched(calls, "one causal", "torch", deterministic=True)

        assert told[1:] == ["aten backward, deterministic"]
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_forward_pass_of_fa3_has_the_backward_kernel_of_torch(calls: Calls) -> None:
    told = launched(calls, "one causal", "fa3", max_splits=1)

    assert told == ["fa3 forward, num_splits=1", "aten backward, in any order"]


def test_a_plan_may_forbid_splits_and_limit_them(calls: Calls) -> None:
    """Sixteen rows of 4,096 keys, which are fewer tiles than processors."""
    subject, layout = Subject("fa3"), Layout([(0, 16, 0, 4096, FULL)], 16, 4096)
    for most in (1, 2, None):
        grouped_flash_attn_func(*drawn(layout, subject), planned(layout, subject, max_splits=most), backend="fa3")

    assert calls == [f"fa3 forward, num_splits={parts}" for parts in (1, 2, 32)]


def plan_of(layout: Layout, heads: tuple[int, int] = (32, 8), head_dim: int = 128, **options: Any) -> Any:
    return planned(layout, Subject("reference", heads=heads, head_dim=head_dim), **options)


def groups(count: int, rows: int, keys: int) -> Layout:
    return Layout([(i * rows, (i + 1) * rows, 0, keys, FULL) for i in range(count)], count * rows, keys)


@pytest.mark.parametrize(
    ("layout", "heads", "way"),
    [
        pytest.param(zigzag([65536], 0, 8), (32, 8), CALLS, id="two groups that fill the GPU"),
        pytest.param(zigzag([65536], 0, 8), (4, 1), COPIES, id="one head of keys at a time"),
        pytest.param(groups(16, 512, 8192), (8, 8), COPIES, id="many small groups"),
        pytest.param(groups(16, 8192, 131072), (32, 8), CALLS, id="copies that would take 22 GB"),
        pytest.param(Layout([], 4, 4), (4, 4), CALLS, id="nothing to do"),
    ],
)
def test_the_way_backward_that_is_predicted_to_be_faster(layout: Layout, heads: tuple[int, int], way: int) -> None:
    assert faster_way(plan_of(layout, heads)) == way


@pytest.mark.parametrize(
    ("layout", "options", "expected"),
    [
        pytest.param(zigzag([65536], 0, 1), {}, 1, id="a full GPU"),
        pytest.param(groups(1, 16, 65536), {}, 17, id="sixteen rows: 8 tiles for 132 processors"),
        pytest.param(groups(1, 16, 65536), {"max_splits": 4}, 4, id="no more than allowed"),
        pytest.param(groups(1, 1, 2**21), {"heads": (1, 1)}, 32, id="no more than 32"),
        pytest.param(Layout([(0, 1, 0, 2**20, FULL)], 40000, 2**20), {}, 1, id="no more memory than 1 GiB"),
        pytest.param(Layout([], 4, 4), {}, 1, id="nothing to do"),
        pytest.param(zigzag([4096], 7, 8), {}, 1, id="128 tiles of 132: parts would only cost"),
        pytest.param(zigzag([4096], 0, 8), {}, 2, id="half of 128 tiles are short"),
        pytest.param(zigzag([32768], 7, 8), {"heads": (4, 1)}, 1, id="128 tiles of one key head"),
        pytest.param(zigzag([4096], 7, 8), {"heads": (4, 1)}, 9, id="16 tiles of one key head"),
    ],
)
def test_keys_are_split_where_one_tile_would_outlast_the_rest(
    layout: Layout, options: dict[str, Any], expected: int
) -> None:
    assert splits(plan_of(layout, **options), 132) == expected


def row_of(name: str) -> str:
    row = backends.TABLE[name]
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
    head_dims = ", ".join(map(str, row.head_dims)) or "any"
    return f"| `{name}` | {row.says} | {', '.join(row.devices) or 'any'} | {dtypes} | {head_dims} |"


def test_the_readme_has_the_table_of_backends() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()

    assert "\n".join(map(row_of, backends.TABLE)) in readme


CPU = planned(LAYOUTS["zigzag"], Subject("reference"))


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("torch", "device = cpu, but should be on cuda"),
        ("fa3", "fa3_fwd is not installed"),
        ("cuda", "it is not written yet"),
        ("fa4", "backend = 'fa4', but should be auto or one of: fa3, triton, torch, cuda, reference"),
    ],
)
def test_a_backend_that_cannot_run_here_says_why(backend: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        grouped_flash_attn_func(*drawn(LAYOUTS["zigzag"], Subject("reference")), CPU, backend=backend)


@pytest.mark.usefixtures("calls")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "dtype = torch.float32, but should be one of: torch.float16, torch.bfloat16"),
        ({"head_dim": 80}, "head_dim = 80, but should be one of: 16, 64, 128"),
    ],
)
def test_what_a_row_excludes_is_named(changes: dict[str, Any], words: str) -> None:
    plan = planned(LAYOUTS["zigzag"], Subject("torch", **changes))

    assert backends.reasons(plan)["torch"] == words
    assert backends.reasons(plan)["reference"] == ""


@pytest.mark.parametrize(
    ("module", "capability", "words"),
    [
        (aten, (7, 5), "compute capability = (7, 5), but should be (8, 0) or later"),
        (aten, (9, 0), ""),
        (fa3, (10, 0), "compute capability = (10, 0), but should be (9, 0)"),
        (fa3, (9, 0), ""),
    ],
)
def test_another_gpu_is_refused(
    module: Any, capability: tuple[int, int], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)

    assert module.refuses(CPU) == words


@pytest.mark.parametrize(("version", "refused"), [("2.10.1+cu130", True), ("2.11.0", False), ("3.0.0a0", False)])
def test_an_older_torch_is_refused(version: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch, "__version__", version)

    assert aten.refuses(CPU) == (f"torch = {version}, but should be 2.11 or later" if refused else "")


@pytest.mark.usefixtures("calls")
def test_a_plan_is_made_ready_before_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(LAYOUTS["zigzag"], Subject("torch"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_a_gpu = replace(plan, device=torch.device("cuda", 0))
    monkeypatch.setattr(backends, "refusal", lambda *_: "")

    with pytest.raises(
        RuntimeError, match=r"plan.prepare\('torch'\) copies to the device: call it before a CUDA graph"
    ):
        on_a_gpu.prepare("torch")


@pytest.mark.usefixtures("calls")
def test_what_a_backend_needs_is_made_once() -> None:
    plan = planned(LAYOUTS["zigzag"], Subject("torch"))

    host, *there = plan.metadata("torch")

    assert plan.metadata("torch")[0] is host
    assert len({part.untyped_storage().data_ptr() for part in there}) == 1  # one copy to the device
    assert plan.prepare("torch") == "torch"
    assert plan.prepare() == "reference"


def test_a_thread_does_not_end_the_determinism_of_another() -> None:
    began = threading.Event()

    def other() -> bool:
        with aten._deterministic(wanted=True):
            began.set()
            return bool(torch.are_deterministic_algorithms_enabled())

    with ThreadPoolExecutor(1) as pool:
        with aten._deterministic(wanted=True):
            told = pool.submit(other)
            assert not began.wait(0.2), "both are at it"
        assert told.result()
    assert not torch.are_deterministic_algorithms_enabled()

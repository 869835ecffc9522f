"""Kernels of grouped attention in Triton's interpreter: the checks of every backend, on tiles of few rows and keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

import interpreted_triton
import triton
import triton.language as tl
from grouped_checks import CHECKS, check_compiled, check_poisoned_keys, check_precision
from grouped_layouts import CAUSAL, FULL, Layout, Subject, drawn, layouts, planned, poisoned_memory, run, run_backward

from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func
from refgrid_solutions.grouped_attention.backends import triton as backend
from refgrid_solutions.grouped_attention.backends.triton import differentiation, items
from refgrid_solutions.grouped_attention.backends.triton.attention import attend
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Configuration, Tiles

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = layouts(8)
# Three programs; blocks of rows and keys that slices of eight rows and more begin and end inside.
SMALL = Configuration(Tiles(32, 16, 4, 2, 3), Tiles(16, 32, 4, 2, 3), Tiles(16, 32, 4, 2, 3))
PLAIN = Subject("triton", heads=(2, 1))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_unfit_interpreter", lambda _: "")
    for head_dim in TABLE:
        monkeypatch.setitem(TABLE, head_dim, SMALL)
    with interpreted_triton.completed():
        yield


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of rows by additions in memory, as on a GPU."""
    monkeypatch.setattr(backend, "_REDUCES", ("cpu",))


@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith("sampled")])
@pytest.mark.parametrize("layout", ["zigzag of two sequences", "both masks", "gaps", "more rows than keys"])
def test_layouts(layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], PLAIN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precision(layout: str) -> None:
    check_precision(LAYOUTS[layout], PLAIN)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("reduced")
def test_precision_of_gradients_added_up_in_memory(layout: str) -> None:
    check_precision(LAYOUTS[layout], PLAIN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (4, 2), (6, 2)])
def test_settings(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS["masks interleaved"]

    check_precision(layout, PLAIN._replace(heads=heads, head_dim=head_dim, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_sizes_that_are_meant_for_a_gpu(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_unfit_interpreter", lambda _: "")
    layout = Layout([(0, 150, 3, 290, CAUSAL), (150, 300, 100, 260, FULL)], 310, 300)

    assert TABLE[head_dim] != SMALL
    check_precision(layout, PLAIN._replace(head_dim=head_dim))


def test_it_is_compiled_into_a_graph() -> None:
    check_compiled(LAYOUTS["both masks"], Subject("triton"), "aot_eager")


@pytest.mark.usefixtures("reduced")
def test_what_was_never_written_is_never_read() -> None:
    layout, subject = LAYOUTS["both masks"], PLAIN
    plan, told = planned(layout, subject), drawn(layout, subject)
    leaves = [tensor.requires_grad_() for tensor in told]
    dout = torch.randn_like(told[0])

    with poisoned_memory():
        out, _ = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend="triton")
        found = torch.autograd.grad(out, leaves, dout)

    for gradient, expected in zip(found, run_backward(told, plan, subject, dout), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.usefixtures("reduced")
def test_poisoned_keys_of_gradients_added_up_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgrid_solutions.grouped_attention.plan.GroupedAttnPlan.deterministic", False)

    check_poisoned_keys(LAYOUTS["gaps"], PLAIN)


@pytest.mark.parametrize(
    ("planned_so", "set_so", "ways"),
    [
        (False, False, {"of_keys"}),
        (True, False, {"of_rows", "of_keys"}),
        (False, True, {"of_rows", "of_keys"}),
    ],
)
@pytest.mark.usefixtures("reduced")
def test_either_way_to_ask_for_the_same_bits_is_heard(
    planned_so: bool, set_so: bool, ways: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: set[str] = set()
    for name in ("of_rows", "of_keys"):
        kernel = getattr(differentiation, name)
        monkeypatch.setattr(differentiation, name, Counted(kernel, name, launched))
    layout = LAYOUTS["both masks"]
    plan, leaves = planned(layout, PLAIN, deterministic=planned_so), [t.requires_grad_() for t in drawn(layout, PLAIN)]
    out = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, return_lse=False, backend="triton")

    with poisoned_memory() if set_so else nullcontext():
        out.backward(torch.ones_like(out))

    assert launched == ways


class Counted:
    """A kernel that says when it is launched."""

    def __init__(self, kernel: Any, name: str, launched: set[str]) -> None:
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launched.add(self.name)
        return self.kernel[grid]


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_a_scale_that_is_not_positive(scale: float) -> None:
    layout, subject = LAYOUTS["both masks"], PLAIN._replace(dtype=torch.float16)
    leaves = [tensor.requires_grad_() for tensor in drawn(layout, subject)]
    found: list[torch.Tensor] = []
    expected: list[torch.Tensor] = []
    for name, told in (("triton", found), ("reference", expected)):
        plan = planned(layout, subject)
        out, lse = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, softmax_scale=scale, backend=name)
        told += [out, lse, *torch.autograd.grad(out.float().square().sum(), leaves)]

    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("total_q", "total_k"), [(0, 9), (9, 0), (0, 0)])
def test_no_rows_or_no_keys_at_all(total_q: int, total_k: int) -> None:
    layout = Layout([(0, total_q, 0, total_k, CAUSAL)], total_q, total_k)
    plan, told = planned(layout, PLAIN), drawn(layout, PLAIN)

    out, lse = run(told, plan, PLAIN)
    gradients = run_backward(told, plan, PLAIN, torch.ones_like(told[0]))

    assert not out.any()
    assert lse.isneginf().all()
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_an_address_that_the_copy_engine_cannot_read(part: int) -> None:
    layout = LAYOUTS["both masks"]
    plan, told = planned(layout, PLAIN), drawn(layout, PLAIN)
    expected = run(told, plan, PLAIN)
    odd = torch.empty(told[part].numel() + 1, dtype=told[part].dtype)[1:].view(told[part].shape)
    odd.copy_(told[part])
    moved = [odd if index == part else tensor for index, tensor in enumerate(told)]

    found = run((moved[0], moved[1], moved[2]), plan, PLAIN)

    assert odd.data_ptr() % 16
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@triton.jit
def _visit(visits: Any, num_tiles: Any, heads: Any, section: Any) -> None:
    for base in tl.range(0, num_tiles * heads - tl.program_id(0), tl.num_programs(0)):
        head, tile = items.head_and_tile(items.item_at(base, num_tiles * heads), num_tiles, heads, section)
        at = visits + head * num_tiles + tile
        tl.store(at, tl.load(at) + 1)


@pytest.mark.parametrize("programs", [1, 2, 5, 60])
@pytest.mark.parametrize(("num_tiles", "heads", "section"), [(1, 1, 1), (7, 5, 2), (3, 4, 4), (4, 6, 1), (5, 7, 3)])
def test_every_tile_of_every_head_is_one_item(num_tiles: int, heads: int, section: int, programs: int) -> None:
    visits = torch.zeros(heads, num_tiles, dtype=torch.int32)

    _visit[(programs,)](visits, num_tiles, heads, section)

    assert (visits == 1).all()


def test_grids_are_as_large_as_the_device_or_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    tiles = Tiles(64, 64, 4, 2, resident=2)

    assert tiles.grid(7, torch.device("cuda", 0)) == (7,)
    assert tiles.grid(7000, torch.device("cuda", 0)) == (264,)


def test_sixty_four_groups_are_planned_within_a_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_unfit_interpreter", lambda _: "")
    ranges = [(256 * index, 256 * (index + 1), 0, 256 * (index + 1), CAUSAL) for index in range(64)]
    layout = Layout(ranges, 64 * 256, 64 * 256)

    def once() -> float:
        start = time.thread_time()  # of one thread: what else this machine does does not count
        planned(layout, Subject("triton", heads=(32, 8), head_dim=128)).prepare("triton")
        return time.thread_time() - start

    assert min(once() for _ in range(50)) < 1e-3


def plan_on(device: str, dtype: torch.dtype = torch.float16) -> Any:
    return SimpleNamespace(device=torch.device(device), dtype=dtype)


def test_an_older_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", "3.5.1")

    assert backend.refuses(plan_on("cpu")) == "triton = 3.5.1, but should be 3.6 or later"


def test_kernels_on_a_cpu_are_interpreted_ones_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    assert backend.refuses(plan_on("cpu")) == ""
    assert re.search("bfloat16 for integers", backend.refuses(plan_on("cpu", torch.bfloat16)))
    monkeypatch.setattr(backend, "JITFunction", type(attend))
    assert re.search("set TRITON_INTERPRET=1 before", backend.refuses(plan_on("cpu")))


def test_kernels_on_a_gpu_are_compiled_ones_for_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.search("TRITON_INTERPRET was set", backend.refuses(plan_on("cuda")))
    monkeypatch.setattr(backend, "JITFunction", type(attend))
    for found, reason in (((9, 0), ""), ((8, 0), "compute capability = (8, 0), but should be (9, 0)")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=found: found)
        assert backend.refuses(plan_on("cuda")) == reason


def test_it_is_in_the_table() -> None:
    assert vars(backends.load("triton")) is vars(backend)


@pytest.mark.parametrize(
    ("collected", "interpreted"),
    [("solutions/test_triton_work.py", True), ("gpu/test_grouped_attention_gpu.py", False)],
)
def test_kernels_are_interpreted_in_runs_of_this_folder_only(collected: str, interpreted: bool) -> None:
    """Whoever names tests/gpu passes by this folder, and must not find kernels interpreted."""
    code = (
        "import pytest, sys; pytest.main(['--collect-only', sys.argv[1]]); print('interpreted_triton' in sys.modules)"
    )
    where = Path(__file__).parents[1] / collected
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run(
        [sys.executable, "-c", code, str(where)], env=environment, capture_output=True, text=True, check=True
    )

    assert told.stdout.splitlines()[-1] == str(interpreted), told.stdout

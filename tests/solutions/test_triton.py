"""Kernels of grouped attention in Triton's interpreter: the checks of every backend, on tiles of few rows and keys."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
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
from grouped_checks import CHECKS, LARGE, check_compiled, check_precision
from grouped_forms import FORMS
from grouped_layouts import CAUSAL, FULL, Layout, Subject, drawn, layouts, planned, poisoned_memory, run, run_backward
from grouped_planning import check_planning
from triton.runtime.errors import InterpreterError

from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func
from refgrid_solutions.grouped_attention.backends import triton as backend
from refgrid_solutions.grouped_attention.backends.triton import items
from refgrid_solutions.grouped_attention.backends.triton.attention import attend
from refgrid_solutions.grouped_attention.backends.triton.configurations import TABLE, Configuration, Tiles

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = layouts(8)
# Blocks of rows and keys that slices of eight rows and more begin and end inside.
SMALL = Configuration(Tiles(32, 16, 4, 2), Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 2))
PLAIN = Subject("triton", heads=(2, 1))


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    monkeypatch.setattr(backend, "_unfit_interpreter", lambda _: "")
    for head_dim in TABLE:
        monkeypatch.setitem(TABLE, head_dim, SMALL)
    with interpreted_triton.completed():
        yield


@pytest.mark.parametrize("check", [name for name in CHECKS if not name.startswith("sampled")])
@pytest.mark.parametrize("layout", ["zigzag of two sequences", "both masks", "gaps", "more rows than keys"])
def test_layouts(layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], PLAIN)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "packed"])  # ranks are threads: not interpreted
def test_other_forms(form: str) -> None:
    FORMS[form](PLAIN)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_precision(layout: str) -> None:
    check_precision(LAYOUTS[layout], PLAIN)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["same keys", "sixteen prefixes", "masks interleaved"])
def test_gradients_of_shared_keys_are_summed_in_float32(layout: str, dtype: torch.dtype) -> None:
    CHECKS["summed in float32"](LAYOUTS[layout], PLAIN._replace(dtype=dtype))


@pytest.mark.parametrize("check", LARGE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inputs_ten_times_as_large(dtype: torch.dtype, check: str) -> None:
    LARGE[check](LAYOUTS["zigzag"], PLAIN._replace(dtype=dtype))


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


def test_what_was_never_written_is_never_read() -> None:
    layout, subject = LAYOUTS["both masks"], PLAIN
    plan, told = planned(layout, subject), drawn(layout, subject)
    leaves = [tensor.requires_grad_() for tensor in told]
    dout = torch.randn_like(told[0])

    with poisoned_memory():
        out, _ = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend="triton")
        found = torch.autograd.grad(out, leaves, dout)

    for gradient, expected in zip(found, run_backward(told, plan, subject, dout), strict=True):
        assert torch.equal(gradient, expected)


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
    head, tile = items.head_and_tile(tl.program_id(0), num_tiles, heads, section)
    at = visits + head * num_tiles + tile
    tl.store(at, tl.load(at) + 1)


@pytest.mark.parametrize(("num_tiles", "heads", "section"), [(1, 1, 1), (7, 5, 2), (3, 4, 4), (4, 6, 1), (5, 7, 3)])
def test_every_tile_of_every_head_is_one_item(num_tiles: int, heads: int, section: int) -> None:
    visits = torch.zeros(heads, num_tiles, dtype=torch.int32)

    _visit[(num_tiles * heads,)](visits, num_tiles, heads, section)

    assert (visits == 1).all()


@triton.jit
def _three_ways(found: Any, number: Any) -> None:
    tl.store(found, (number + 1) * 2 - 3)


@pytest.mark.parametrize(("number", "name"), [(2**31 - 1, "add"), (2**30, "mul"), (-(2**30) - 1, "sub")])
def test_integers_that_overflow_are_noticed(number: int, name: str) -> None:
    found = torch.zeros(1, dtype=torch.int32)
    _three_ways[(1,)](found, 20)
    assert found.item() == 39

    with pytest.raises(InterpreterError, match=f"int32 overflow detected for operation {name}"):
        _three_ways[(1,)](found, number)


def test_many_groups_are_no_more_operations_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(backend, "_unfit_interpreter", lambda _: "")

    check_planning(PLAIN)


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
    [("solutions/test_solutions_readme.py", True), ("gpu/test_grouped_attention_gpu.py", False)],
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

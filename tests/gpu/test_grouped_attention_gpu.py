"""Grouped attention on a real GPU, which needs nothing but pytest, torch and what a backend brings along:

    PYTHONPATH=solutions/src python3 -m pytest tests/gpu/test_grouped_*_gpu.py

A backend that is not installed is skipped and says so; GROUPED_BACKENDS=torch,triton,fa3 are those that must run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from grouped_checks import CHECKS, LARGE, check_compiled, check_precision
from grouped_forms import FORMS
from grouped_gpu import BACKENDS, subject_of
from grouped_layouts import Layout, Subject, drawn, layouts, planned, run_both
from grouped_planning import check_planning

from refgrid_solutions.grouped_attention import backends, grouped_flash_attn_func
from refgrid_solutions.grouped_attention.backends import aten
from refgrid_solutions.grouped_attention.predicted import CALLS, COPIES

LAYOUTS = {f"{name}, {unit}": layout for unit in (64, 43) for name, layout in layouts(unit).items()}
WHOLE = [name for name in CHECKS if not name.startswith("sampled")]  # those are for the sizes of the stress tests
WAYS = {"copies": COPIES, "calls": CALLS}


@pytest.mark.parametrize("check", WHOLE)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend: str, layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], subject_of(backend))


SETTINGS = [
    (backend, dtype, heads, head_dim)
    for backend in BACKENDS
    for dtype in backends.TABLE[backend].dtypes
    if dtype != torch.float64  # which is the truth itself
    for head_dim in (backends.TABLE[backend].head_dims or (64, 128, 256))
    for heads in ((1, 1), (4, 4), (32, 8), (8, 1), (6, 2))
]


@pytest.mark.parametrize("layout", ["zigzag of two sequences, 43", "masks interleaved, 64", "gaps, 43"])
@pytest.mark.parametrize(("backend", "dtype", "heads", "head_dim"), SETTINGS)
def test_settings(backend: str, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, layout: str) -> None:
    check_precision(LAYOUTS[layout], subject_of(backend, dtype=dtype, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.endswith("43")])
@pytest.mark.parametrize("way", WAYS)
def test_both_ways_backward(way: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aten, "faster_way", lambda _: WAYS[way])

    check_precision(LAYOUTS[layout], subject_of("torch"))


@pytest.mark.parametrize("check", ["precision", "rows without keys", "visible counts", "summed in float32"])
@pytest.mark.parametrize("layout", ["zigzag of two sequences, 43", "masks interleaved, 64", "gaps, 43"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_reference(head_dim: int, layout: str, check: str) -> None:
    CHECKS[check](LAYOUTS[layout], subject_of("reference", head_dim=head_dim))


@pytest.mark.filterwarnings(
    "ignore:Attempting to run cuBLAS, but there was no current CUDA context"
)  # of emulated ranks
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", dict.fromkeys([*BACKENDS, "reference"]))
def test_other_forms(backend: str, form: str) -> None:
    FORMS[form](subject_of(backend))


@pytest.mark.parametrize("check", LARGE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_ten_times_as_large(backend: str, check: str) -> None:
    LARGE[check](LAYOUTS["zigzag, 64"], subject_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["zigzag, 64", "masks interleaved, 43"])
@pytest.mark.filterwarnings("default")  # what the compiler itself warns of is not this project's
def test_compiled(backend: str, layout: str) -> None:
    torch._dynamo.reset()
    check_compiled(LAYOUTS[layout], subject_of(backend), "inductor")


def step_of(layout: Layout, subject: Subject) -> tuple[list[torch.Tensor], Any]:
    """Inputs (q, k, v, dout), and a forward and backward pass over them."""
    plan = planned(layout, subject, deterministic=True)
    plan.prepare(subject.backend)
    leaves = [tensor.requires_grad_() for tensor in drawn(layout, subject)]
    dout = torch.randn_like(leaves[0])

    def step() -> list[torch.Tensor]:
        out, lse = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend=subject.backend)
        return [out, lse, *torch.autograd.grad(out, leaves, dout)]

    return [*leaves, dout], step


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # nothing is accumulated
@pytest.mark.parametrize("layout", ["zigzag, 64", "masks interleaved, 43"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_gives_the_same_bits(backend: str, layout: str) -> None:
    inputs, step = step_of(LAYOUTS[layout], subject_of(backend))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()

    for name, found, expected in zip(("out", "lse", "dq", "dk", "dv"), captured, step(), strict=True):
        assert torch.equal(found, expected), f"{name} of the captured graph differs"


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_that_is_not_ready_says_so_inside_a_graph(backend: str) -> None:
    subject = subject_of(backend)
    plan, told = planned(LAYOUTS["zigzag, 64"], subject), drawn(LAYOUTS["zigzag, 64"], subject)
    plan._metadata.clear()

    words = "call it before a CUDA graph is captured"
    with pytest.raises(RuntimeError, match=words), torch.cuda.graph(torch.cuda.CUDAGraph()):
        grouped_flash_attn_func(*told, plan, backend=backend)


@pytest.fixture
def _no_synchronisation() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.endswith("43")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_never_waits_for_the_gpu(backend: str, layout: str) -> None:
    _, step = step_of(LAYOUTS[layout], subject_of(backend))
    step()
    torch.cuda.set_sync_debug_mode("error")
    step()


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("layout", ["zigzag, 64", "gaps, 43"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_planning_never_waits_for_the_gpu(backend: str, layout: str) -> None:
    subject = subject_of(backend)
    torch.cuda.set_sync_debug_mode("error")
    planned(LAYOUTS[layout], subject).prepare(backend)


@pytest.mark.usefixtures("_no_synchronisation")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_waiting_for_the_gpu_would_be_noticed() -> None:
    value = torch.ones(1, device="cuda")
    torch.cuda.set_sync_debug_mode("error")

    with pytest.raises(RuntimeError, match="synchroniz"):
        value.item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_groups_are_no_more_operations_than_few(backend: str) -> None:
    check_planning(subject_of(backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_stream_than_the_default_one(backend: str) -> None:
    subject = subject_of(backend)
    expected = run_both(LAYOUTS["zigzag, 64"], subject, deterministic=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = run_both(LAYOUTS["zigzag, 64"], subject, deterministic=True)
        torch.cuda.current_stream().synchronize()

    assert torch.equal(found.out, expected.out)
    assert torch.equal(found.lse, expected.lse)

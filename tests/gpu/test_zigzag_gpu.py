"""Zigzag attention on real GPUs: `pytest tests/gpu/test_zigzag_gpu.py` needs pytest, torch and what a backend brings.

Ranks that are processes run on as many GPUs as are there, up to four; their number is in the names of the tests. More
ranks than there are GPUs are emulated on one.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from emulated_ranks import LoneExchange
from grouped_gpu import BACKENDS, subject_of
from process_ranks import torchrun
from zigzag_checks import NAMES, Case, Tensors, drawn, expected, hold, joined, run_emulated, run_rank

from refgrid_solutions.grouped_attention.zigzag.planned import zigzag_plan

PROGRAM = Path(__file__).resolve().parents[1] / "zigzag_torchrun.py"
# Autograd's threads say so of themselves, once each.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context")

GPUS = [count for count in (1, 2, 4) if count <= torch.cuda.device_count()]
TOKENS = ("4096", "8192", "16384")


def test_there_is_a_gpu() -> None:
    assert GPUS, "torch sees no GPU: nothing here would run"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gpus", GPUS, ids=lambda count: f"{count} GPUs")
def test_every_rank_gives_attention_on_one_gpu(gpus: int, backend: str) -> None:
    subject_of(backend)
    said = torchrun(PROGRAM, gpus, "--backend", backend, "--tokens", *TOKENS, limit=300)
    print(said)  # noqa: T201 - on how many it ran, and for how long

    assert [line.split()[6] for line in said.splitlines() if line.startswith(f"ok on {gpus} ranks of ")] == [*TOKENS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", range(2, 17))
def test_every_rank_emulated_on_one_gpu(world_size: int, backend: str) -> None:
    """Sequences of about 1,000 and 3,000 tokens, chunks of any length."""
    subject_of(backend)
    lengths = [tokens // (2 * world_size) * 2 * world_size for tokens in (1000, 3000)]
    case = Case(lengths, 8, (32, 8), 128, torch.bfloat16, "cuda", backend=backend)
    told = drawn(case)
    should = expected(case, told)

    for stride in (1, 8):
        for grouped in (True, False):
            ways = case._replace(stride=stride, grouped=grouped)
            hold(case, joined(case, run_emulated(ways, told, world_size)), should)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_made_on_a_busy_stream_serves_another_one_at_once(backend: str) -> None:
    """Nobody tells the second stream to wait for the first, which sleeps before the plan's copy."""
    subject_of(backend)
    case = Case([2048], 8, (32, 8), 128, torch.bfloat16, "cuda", backend=backend)
    told = drawn(case)
    _alone(case, told)  # compiles
    zigzag_plan.cache_clear()
    torch.cuda.synchronize()

    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(2**30)  # about half a second
        _alone(case, told)
    with torch.cuda.stream(torch.cuda.Stream()):
        found = _alone(case, told)
    torch.cuda.synchronize()

    hold(case, found, expected(case, told))


def _alone(case: Case, told: Tensors) -> Tensors:
    """On the current stream, of which the threads of emulated ranks do not know."""
    return run_rank(case, told, LoneExchange(0, 1), 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_determinism_gives_the_same_bits(causal: bool, backend: str) -> None:
    subject_of(backend)
    case = Case([512, 1024], 2, (8, 2), 128, torch.bfloat16, "cuda", causal, backend=backend, deterministic=True)
    told = drawn(case)

    once, again = (joined(case, run_emulated(case, told, 4)) for _ in range(2))

    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
    hold(case, once, expected(case, told))


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # nothing is accumulated
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (3, 8)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_graph_gives_the_same_bits(backend: str, rank: int, world_size: int) -> None:
    """Of a rank alone: what crosses ranks is a copy on the device."""
    subject_of(backend)
    case = Case([1024, 3072], 2, (32, 8), 128, torch.bfloat16, "cuda", backend=backend, deterministic=True)
    told = drawn(case)

    def step() -> Tensors:
        return run_rank(case, told, LoneExchange(rank, world_size), rank, world_size)

    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in told:
        tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    torch.cuda.synchronize()

    for name, found, expected_one in zip(NAMES, captured, step(), strict=True):
        assert torch.equal(found, expected_one), f"{name} of the captured graph differs"

"""The ways to compute one shape: a grouped call of each backend, and what it is held against.

Every way that computes the shape's own result is compared with the others before it is timed. The dense call is another
problem, of as many floating point operations.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from grouped_bench.context_parallel import attention_of_rank
from grouped_bench.shapes import HEAD_DIM, Piece, Shape
from refgrid_solutions.grouped_attention import CAUSAL, GroupedAttnPlan, grouped_flash_attn_func, plan_grouped_attn
from refgrid_solutions.grouped_attention.backends import refusal

BACKENDS = ("fa3", "triton", "torch", "reference")
# As two 16-bit kernels differ that round at different places; a wrong mask is off by ten times as much.
_SAME = 2e-2
_PAGE = 16

Call = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Problem:
    """A shape with its tensors; out and lse of any way have q's rows."""

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    def plan(self, pieces: Sequence[Piece], backend: str = "auto") -> GroupedAttnPlan:
        """For these slices of it, ready for this backend."""
        return plan_grouped_attn(
            [piece[0:2] for piece in pieces],
            [piece[2:4] for piece in pieces],
            [piece[4] for piece in pieces],
            total_q=len(self.q),
            total_k=len(self.k),
            num_heads_q=self.q.shape[1],
            num_heads_k=self.k.shape[1],
            head_dim=self.q.shape[2],
            dtype=self.q.dtype,
            device=self.q.device,
            backend=backend,
        )


def problem(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """Normal numbers: what a kernel's speed depends on through the power that it draws."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(shape.total_q, shape.heads[0]), *[(shape.total_k, shape.heads[1])] * 2, (shape.total_q, shape.heads[0])]
    drawn = [torch.randn(*size, HEAD_DIM, generator=generator, device=device, dtype=dtype) for size in sizes]
    return Problem(shape, *drawn)


def forward_ways(of: Problem, backends: Sequence[str] = BACKENDS) -> tuple[dict[str, Call], dict[str, str]]:
    """The ways that can run here, and why the others cannot."""
    ways: dict[str, Call] = {}
    plan = of.plan(of.shape.pieces)
    refused = {name: reason for name in backends if (reason := refusal(name, plan))}
    for name in (name for name in backends if name not in refused):
        ways[f"{name}: grouped"] = _grouped(of, plan, name)
        ways[f"{name}: launches in order"] = _in_order(of, name)
        if of.q.is_cuda:
            ways[f"{name}: a stream each"] = _on_streams(of, name)
        ways[f"{name}: dense, as many FLOPs"] = _dense(of, plan, name)
    if of.q.is_cuda and of.shape.world > 1:
        ways["PyTorch: context parallel"] = _context_parallel(of)
    if reason := _unpaged(of):
        refused["flashinfer"] = reason
    else:
        ways["flashinfer: paged, one launch"] = _paged(of)
    demand_equal(ways)
    return ways, refused


def backward_ways(of: Problem, backends: Sequence[str] = BACKENDS) -> tuple[dict[str, Call], dict[str, str]]:
    """Forward and backward together, through autograd."""
    ways: dict[str, Call] = {}
    plan = of.plan(of.shape.pieces)
    refused = {name: reason for name in backends if (reason := refusal(name, plan))}
    for name in (name for name in backends if name not in refused):
        ways[f"{name}: grouped"] = _both(of, partial(_grouped, plan=plan, name=name))
        ways[f"{name}: launches in order"] = _both(of, partial(_in_order, name=name))
        if of.q.is_cuda:
            ways[f"{name}: a stream each"] = _both(of, partial(_on_streams, name=name))
        ways[f"{name}: dense, as many FLOPs"] = _both(_dense_problem(of, plan), partial(_whole, name=name))
    if of.q.is_cuda and of.shape.world > 1:
        ways["PyTorch: context parallel"] = _both(of, _context_parallel)
    demand_equal(ways)
    return ways, refused


def _grouped(of: Problem, plan: GroupedAttnPlan, name: str) -> Call:
    plan.prepare(name)
    return lambda: _attend(of.q, of.k, of.v, plan, name)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: GroupedAttnPlan, name: str) -> torch.Tensor:
    return grouped_flash_attn_func(q, k, v, plan, return_lse=False, backend=name)


def _single_calls(of: Problem, name: str) -> list[Call]:
    """A call for each slice, over its rows alone and its keys where they are."""
    return [_single(of, piece, name) for piece in of.shape.pieces]


def _single(of: Problem, piece: Piece, name: str) -> Call:
    rows, keys = slice(*piece[0:2]), slice(*piece[2:4])
    own = replace(of, q=of.q[rows], k=of.k[keys], v=of.v[keys])
    plan = own.plan([(0, len(own.q), 0, len(own.k), piece[4])])
    plan.prepare(name)
    # Cut in the call: autograd goes back on the stream on which a tensor was cut, which a capture must see.
    return lambda: _attend(of.q[rows], of.k[keys], of.v[keys], plan, name)


def _in_order(of: Problem, name: str) -> Call:
    calls = _single_calls(of, name)
    return lambda: torch.cat([call() for call in calls])


def _on_streams(of: Problem, name: str) -> Call:
    """As many streams as slices, up to eight, which wait for the caller's and for which the caller's waits."""
    calls = _single_calls(of, name)
    streams = [torch.cuda.Stream() for _ in range(min(len(calls), 8))]

    def run() -> torch.Tensor:
        here, found = torch.cuda.current_stream(), []
        for stream in streams:
            stream.wait_stream(here)
        for number, call in enumerate(calls):
            with torch.cuda.stream(streams[number % len(streams)]):
                found.append(call())
        for stream in streams:
            here.wait_stream(stream)
        return torch.cat(found)

    return run


def _dense(of: Problem, plan: GroupedAttnPlan, name: str) -> Call:
    return _whole(_dense_problem(of, plan), name)


def _dense_problem(of: Problem, plan: GroupedAttnPlan) -> Problem:
    """One causal sequence of as many visible pairs."""
    pairs = plan.forward_flops // (4 * plan.head_dim * plan.num_heads_q)
    rows = max(1, round((math.sqrt(8 * pairs + 1) - 1) / 2))
    shape = replace(of.shape, kind="dense", pieces=((0, rows, 0, rows, CAUSAL),), world=0)
    return problem(shape, of.q.device, of.q.dtype)


def _whole(of: Problem, name: str) -> Call:
    return _grouped(of, of.plan(of.shape.pieces), name)


def _both(of: Problem, way: Callable[[Problem], Call]) -> Call:
    """Gradients of q, k and v, returned as one tensor so that ways can be compared."""
    leaves = [tensor.detach().requires_grad_() for tensor in (of.q, of.k, of.v)]
    call = way(replace(of, q=leaves[0], k=leaves[1], v=leaves[2]))

    def run() -> torch.Tensor:
        gradients = torch.autograd.grad(call(), leaves, of.dout)
        return torch.cat([gradient.flatten() for gradient in gradients])

    return run


def _context_parallel(of: Problem) -> Call:
    return attention_of_rank(of.shape.world, of.shape.rank, of.q, of.k, of.v)


def _unpaged(of: Problem) -> str:
    """Why FlashInfer cannot take the shape in one launch, if it cannot."""
    if not of.q.is_cuda:
        return f"device = {of.q.device}, but should be on cuda"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if any(piece[2] % _PAGE or piece[3] % _PAGE for piece in of.shape.pieces):
        return f"keys of {of.shape.name} should begin and end at multiples of {_PAGE}"
    masks = {piece[4] for piece in of.shape.pieces}
    return "" if len(masks) == 1 else f"{of.shape.name} has {len(masks)} masks, but a launch has one"


def _paged(of: Problem) -> Call:
    """FlashInfer's paged prefill over pages that slices share."""
    import flashinfer

    pieces = of.shape.pieces
    ints: dict[str, Any] = {"dtype": torch.int32, "device": of.q.device}
    rows = torch.tensor([0, *(piece[1] for piece in pieces)], **ints)
    pages = [range(piece[2] // _PAGE, piece[3] // _PAGE) for piece in pieces]
    starts = torch.tensor([0, *_running(map(len, pages))], **ints)
    indices = torch.cat([torch.arange(each.start, each.stop, **ints) for each in pages])
    last = torch.full((len(pieces),), _PAGE, **ints)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
        torch.empty(2**28, dtype=torch.uint8, device=of.q.device), "NHD", backend="fa3"
    )
    heads = (*of.shape.heads, HEAD_DIM, _PAGE)
    wrapper.plan(rows, starts, indices, last, *heads, causal=pieces[0][4] == CAUSAL, q_data_type=of.q.dtype)
    cache = tuple(each.unflatten(0, (-1, _PAGE)) for each in (of.k, of.v))
    return lambda: wrapper.run(of.q, cache)


def _running(lengths: Iterator[int]) -> Iterator[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


def demand_equal(ways: dict[str, Call]) -> None:
    """A fast way to something else is no way: raises ValueError when two that should agree do not."""
    found = {name: call().float() for name, call in ways.items() if "dense" not in name}
    if not found:
        return
    first, *_ = found
    for name, result in found.items():
        worst = float((result - found[first]).abs().max())
        if not worst <= _SAME * max(1.0, float(found[first].abs().max())):
            raise ValueError(f"{name} and {first} differ by {worst:.3g}: one of them computes something else")

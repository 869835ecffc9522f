"""Equal inputs must give equal bits: run after run, at other addresses, and wherever in a batch a row stands.

A failed comparison is repeated too, once, to tell a mismatch from a side that gives other numbers each time. A repeat
can only change the name of the failure: nothing is retried until it is green.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch

from refgrid.dataset.case import Case
from refgrid.proving.compare import Comparison
from refgrid.proving.finding import Finding, forget_locals, judge
from refgrid.proving.inputs import Inputs
from refgrid.proving.outputs import Tensors, same_bits
from refgrid.proving.unwritten import Unwritten, holds_filling
from refgrid.proving.workbench import Laid, Workbench
from refgrid.records.record import Verdict

Compare = Callable[[Tensors, Tensors], tuple[Comparison, ...]]


class Batched(NamedTuple):
    """References of an op (a glob) whose rows along an axis have nothing to do with each other, and why that is so."""

    op: str
    axis: str
    why: str


# Attention, mixtures of experts, products and recurrences over several tokens work on many rows at once, in blocks
# whose size depends on all of them: they promise a tolerance, not bits. So does gdn_decode, of one token: a CPU takes
# softplus and sigmoid of the last numbers, which fill no vector register, by another routine (of 8 value heads and 3
# sequences 4 % of the states change with their place, by 4e-7). The states of mamba_ssu_decode lie in slots that its
# sequences name: a row that stands twice here would write one slot twice, and one that is left out none.
BATCHED: tuple[Batched, ...] = (
    Batched("rmsnorm", "batch_size", "a sum over each row, and products element by element"),
    Batched("fused_add_rmsnorm", "batch_size", "as rmsnorm, after a sum element by element"),
    Batched("rope_with_cos_sin_cache_neox_style", "num_tokens", "products and sums element by element"),
)


@dataclass(frozen=True)
class _Change:
    """How many elements of an output have other bits, and the largest difference of two numbers among them."""

    output: str
    elements: int
    of: int
    largest: float

    def told(self) -> str:
        return f"in {self.elements} of {self.of} elements, by up to {self.largest:.3g}"


def demand_deterministic(workbench: Workbench, bench: Laid, case: Case) -> None:
    """Raise Finding("nondeterministic") where the reference's bits depend on more than its inputs."""
    first = workbench.reference(bench)
    for memory in _fillings(first):
        if changes := _changes(first, _call_in(memory, workbench, bench)):
            told = f"differs between two runs of the reference on equal inputs{_why(workbench, bench, first)}"
            raise Finding(Verdict.NONDETERMINISTIC, f"{changes[0].output} {told} {changes[0].told()}")
    for batched in BATCHED:
        if fnmatchcase(case.op, batched.op) and bench.axes.get(batched.axis, 0) > 1:
            _demand_independent_rows(workbench, bench, first, batched.axis)


def _fillings(first: Tensors) -> list[Unwritten]:
    """What later runs find in fresh memory: not only what a case before may have left in it for the first one."""
    filled = any(holds_filling(tensor) for tensor in first.values())
    return [Unwritten(), Unwritten(zeros=True)] if filled else [Unwritten()]


def _call_in(memory: Unwritten, workbench: Workbench, bench: Laid) -> Tensors:
    """Another run; where only what it finds in fresh memory makes it fail, Finding says so."""
    try:
        return workbench.call_reference(bench, elsewhere=True, memory=memory)
    except Exception as error:
        verdict, reason = judge(error)
        if verdict is not Verdict.ERROR:
            raise
        workbench.call_reference(bench, elsewhere=True)
        told = f"the reference fails where memory of torch.empty holds {memory.told}: {reason}"
        raise Finding(Verdict.NONDETERMINISTIC, told) from error


def _why(workbench: Workbench, bench: Laid, first: Tensors) -> str:
    """What of the other run it takes to change the result; empty if nothing."""
    if _changes(first, workbench.call_reference(bench)):
        return ""
    if _changes(first, workbench.call_reference(bench, elsewhere=True)):
        return " at other addresses"
    return ", as it reads memory of torch.empty that it has not written,"


def _demand_independent_rows(workbench: Workbench, bench: Laid, first: Tensors, axis: str) -> None:
    """Rows in another order, some of them twice and others not: each must be what it was among its old neighbours."""
    count, specs = bench.axes[axis], {**bench.definition.inputs, **bench.definition.outputs}
    rows = torch.randint(count, (count,), generator=torch.Generator().manual_seed(count))

    def moved(tensors: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value[rows.to(value.device)] if (specs[name].shape or ("",))[0] == axis else value
            for name, value in tensors.items()
        }

    given = replace(bench, inputs=Inputs(moved(bench.inputs.tensors), bench.inputs.hash))
    if changes := _changes(moved(first), workbench.call_reference(given)):
        told = f"of a row depends on where in {axis} it stands, or beside which others, {changes[0].told()}"
        raise Finding(Verdict.NONDETERMINISTIC, f"{changes[0].output} {told}")


def _changes(first: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor]) -> list[_Change]:
    return [_change(name, tensor, again[name]) for name, tensor in first.items() if not same_bits(tensor, again[name])]


def _change(output: str, first: torch.Tensor, again: torch.Tensor) -> _Change:
    if (first.shape, first.dtype) != (again.shape, again.dtype):
        return _Change(output, first.numel(), first.numel(), math.inf)
    one, other = (tensor.contiguous().reshape(-1, 1).view(torch.uint8) for tensor in (first, again))
    elements = int((one != other).any(1).sum())
    gaps = (first.double() - again.double()).abs()
    gaps.masked_fill_(first.isnan() != again.isnan(), math.inf)  # as where memory was not written
    return _Change(output, elements, first.numel(), float(gaps.nan_to_num(nan=0.0, posinf=torch.inf).max()))


class Side(NamedTuple):
    """One side of a comparison: who it is, what it gave, and how it is called again."""

    name: str
    tensors: Tensors
    call: Callable[[], Tensors]


def repeat(one: Side, other: Side, compare: Compare, matched: bool = False) -> tuple[Verdict, list[str]]:
    """Run both sides of a failed comparison once more: the verdict that remains, and notes for its reason.

    Nondeterministic is a side that differs from itself beyond the tolerance, or that matches the other one the next
    time. One that changes by less keeps its mismatch, and the note says by how much it changed. So does one that
    `matched` the first time, being nan where the other is.
    """
    found = (
        _repeated(one, lambda again: not matched and _all_match(compare(again, other.tensors)), compare),
        _repeated(other, lambda again: not matched and _all_match(compare(one.tensors, again)), compare),
    )
    verdict = Verdict.NONDETERMINISTIC if any(wild for wild, _ in found) else Verdict.MISMATCH
    return verdict, [note for _, note in found if note]


def _repeated(side: Side, comes_to_match: Callable[[Tensors], bool], compare: Compare) -> tuple[bool, str]:
    """Whether a side is wild, and what changed."""
    try:
        again = side.call()
        changes = _changes({name: tensor for name, tensor in side.tensors.items() if name in again}, again)
        wild = bool(changes) and (comes_to_match(again) or not _all_match(compare(again, side.tensors)))
    except Exception as error:  # noqa: BLE001 - the comparison has failed already, and this only adds to its reason
        forget_locals(error)
        return False, f"{side.name} could not be repeated: {judge(error)[1]}"
    told = "; ".join(f"{change.output} {change.told()}" for change in changes)
    return wild, f"a second run of {side.name} on equal inputs differs: {told}" if changes else ""


def _all_match(comparisons: tuple[Comparison, ...]) -> bool:
    return all(comparison.matches for comparison in comparisons)

"""What a reference or a source has returned: its outputs by name, of the declared shapes and dtypes, and their bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from refgrid.dataset.definition import Definition
from refgrid.proving.finding import Finding
from refgrid.proving.rows import index_of
from refgrid.records.record import Verdict

if TYPE_CHECKING:
    from refgrid.proving.workbench import Laid

Tensors = dict[str, torch.Tensor]

_COMPARED = 2**28  # bytes at a time: a GPU puts down what it finds of each before it tells whether all are equal


def named(result: Any, definition: Definition) -> Tensors:
    """Outputs by name, from a tensor, a sequence in the definition's order, or a mapping."""
    if isinstance(result, Mapping):
        result = [result.get(name) for name in definition.outputs]
    values = list(result) if isinstance(result, tuple | list) else [result]
    if len(values) != len(definition.outputs) or not all(isinstance(value, torch.Tensor) for value in values):
        found = [type(value).__name__ for value in values]
        reason = f"reference returns {found} but the outputs are {list(definition.outputs)}, each a Tensor"
        raise Finding(Verdict.ERROR, reason)
    return dict(zip(definition.outputs, values, strict=True))


def demand_shapes(who: str, tensors: Tensors, bench: Laid) -> None:
    """Raise Finding for an output of another shape than the definition gives it."""
    for name, tensor in tensors.items():
        wanted = bench.definition.shape(name, bench.axes) or ()
        if tuple(tensor.shape) != wanted:
            reason = f"{who}: {name}.shape = {list(tensor.shape)}, but should be {list(wanted)}"
            raise Finding(Verdict.ERROR, f"{reason} [{bench.definition.name}]")


def demand_dtypes(who: str, tensors: Tensors, bench: Laid) -> None:
    """Raise Finding for an output of another dtype than the definition gives it."""
    for name, tensor in tensors.items():
        found, wanted = str(tensor.dtype).removeprefix("torch."), bench.definition.outputs[name].dtype
        if found != wanted:
            reason = f"{who}: {name}.dtype = {found}, but should be {wanted}"
            raise Finding(Verdict.ERROR, f"{reason} [{bench.definition.name}]")


def demand_own_memory(
    who: str, tensors: Tensors, held: Mapping[str, Tensors], lent: Iterable[torch.Tensor] = ()
) -> None:
    """Raise Finding for an output in memory that an earlier result lies in: comparing the two would show nothing.

    `held` are results that are still referred to, so that no allocator can have given their memory again. `lent` are
    inputs that all calls share and none may write to: a result that is a view of one is overwritten by nobody.
    """
    taken = {_storage(tensor): by for by, given in held.items() for tensor in given.values() if tensor.numel()}
    for tensor in lent:
        taken.pop(_storage(tensor), None)
    for name, tensor in tensors.items():
        if tensor.numel() and (by := taken.get(_storage(tensor))):
            reason = f"{who}: {name} lies in memory that {by} gave before, whose result is overwritten by it"
            raise Finding(Verdict.ERROR, f"{reason}; each call must give memory of its own")


def nan_alike(name: str, actual: torch.Tensor, expected: torch.Tensor, inputs: Mapping[str, Any]) -> str:
    """Where both sides are nan, in words; empty if nowhere, or only where an op leaves a pool as it was.

    Such a pool is an output of an input's shape, and holds nan where that input does.
    """
    if not (_holds_nan(actual) and _holds_nan(expected)):
        return ""
    alike = actual.isnan() & expected.isnan()
    for value in inputs.values():
        if isinstance(value, torch.Tensor) and value.shape == actual.shape and _holds_nan(value):
            alike &= ~value.isnan()
    if not alike.any():
        return ""
    first = list(index_of(int(alike.view(torch.uint8).argmax()), alike.shape))  # places of all would take gigabytes
    return f"{name} is nan on both sides at {first} and {int(alike.count_nonzero())} places in all"


def _holds_nan(tensor: torch.Tensor) -> bool:
    """The largest number is nan if any is, and takes no memory to find; of eight bits PyTorch finds none."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return False
    return bool((tensor.half() if tensor.itemsize == 1 else tensor).amax().isnan())


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage().data_ptr())


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself and -0.0 differs from 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8).split(_COMPARED) for tensor in (left, right))
    return all(torch.equal(*parts) for parts in zip(*flat, strict=True))

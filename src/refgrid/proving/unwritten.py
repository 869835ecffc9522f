"""Fresh memory that holds what no call can take for its own: who reads it before writing gives other numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAKERS: frozenset[Callable[..., torch.Tensor]] = frozenset(
    {
        torch.empty,
        torch.empty_like,
        torch.empty_permuted,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }
)
_OPERATORS = frozenset(getattr(torch.ops.aten, maker.__name__) for maker in _MAKERS)
_ONES = 0xFF  # all bits set: nan in every floating dtype, -1 in those of signed numbers


class Unwritten(TorchFunctionMode):
    """While it is on, tensors of torch.empty and its kin are nan, whole numbers -1 and booleans True; or `zeros`.

    Memory that a process gets for the first time is all zeros, and what it gets again often holds the last call's
    result, so that neither shows whether a result was written. What libraries allocate below Python stays as it is.
    """

    def __init__(self, zeros: bool = False) -> None:
        super().__init__()
        self._byte = 0 if zeros else _ONES
        self.told = "zeros" if zeros else "nan and -1"

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if (func in _MAKERS or _is_operator(func)) and (kwargs or {}).get("out") is None:
            _fill(made, self._byte)
        return made


def _is_operator(func: Callable[..., Any]) -> bool:
    """Whether it is torch.ops.aten.empty or its kin, with or without an overload; the compiler cannot look that up."""
    return not torch.compiler.is_compiling() and getattr(func, "overloadpacket", func) in _OPERATORS


def _fill(tensor: torch.Tensor, byte: int) -> None:
    if tensor.layout is not torch.strided:  # no number is stored in one that is sparse
        return
    with torch.no_grad():
        if tensor.dtype == torch.bool or torch.compiler.is_compiling() or not _filled(tensor, byte):
            tensor.fill_(_number(tensor.dtype) if byte else 0)


def _filled(tensor: torch.Tensor, byte: int) -> bool:
    """Fill all of its memory; False where it stands for another tensor, as inside torch.vmap, torch.func and traces."""
    try:
        if tensor.device.type != "meta":
            tensor.untyped_storage().fill_(byte)
    except RuntimeError:  # or NotImplementedError, which is one
        return False
    return True


def _number(dtype: torch.dtype) -> float:
    """What all bits set are in a dtype."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    if dtype == torch.bool:  # whose byte of 255 is no boolean
        return True
    return -1 if dtype.is_signed else torch.iinfo(dtype).max


def holds_filling(tensor: torch.Tensor) -> bool:
    """Whether one of its elements may be what Unwritten fills memory with; any nan may, its bits are not kept."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.isnan().any())
    return bool((tensor == _number(tensor.dtype)).any())

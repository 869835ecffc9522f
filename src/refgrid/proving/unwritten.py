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
_BYTE = 0xFF  # all bits set: nan in every floating dtype, -1 in those of signed numbers


class Unwritten(TorchFunctionMode):
    """While it is on, tensors of torch.empty and its kin are nan, whole numbers -1 and booleans True.

    Memory that a process gets for the first time is all zeros, and what it gets again often holds the last call's
    result, so that neither shows whether a result was written. What libraries allocate below Python stays as it is.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if (func in _MAKERS or _is_operator(func)) and (kwargs or {}).get("out") is None:
            _fill(made)
        return made


def _is_operator(func: Callable[..., Any]) -> bool:
    """Whether it is torch.ops.aten.empty or its kin, with or without an overload; the compiler cannot look that up."""
    return not torch.compiler.is_compiling() and getattr(func, "overloadpacket", func) in _OPERATORS


def _fill(tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided:  # no number is stored in one that is sparse
        return
    with torch.no_grad():
        if tensor.dtype == torch.bool:  # a byte of 255 is no boolean
            tensor.fill_(True)
        elif torch.compiler.is_compiling() or not _filled(tensor):
            tensor.fill_(_number(tensor.dtype))


def _filled(tensor: torch.Tensor) -> bool:
    """Fill all of its memory; False where it stands for another tensor, as inside torch.vmap, torch.func and traces."""
    try:
        if tensor.device.type != "meta":
            tensor.untyped_storage().fill_(_BYTE)
    except RuntimeError:  # or NotImplementedError, which is one
        return False
    return True


def _number(dtype: torch.dtype) -> float:
    """What all bits set are in a dtype."""
    if dtype.is_floating_point or dtype.is_complex:
        return math.nan
    return -1 if dtype.is_signed else torch.iinfo(dtype).max

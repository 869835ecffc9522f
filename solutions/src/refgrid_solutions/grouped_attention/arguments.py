"""Arguments that several functions take, held against what is legal: errors name the argument, its value and that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def check_options(
    *, dropout_p: float = 0.0, window_size: Any = (-1, -1), softcap: float = 0.0, alibi_slopes: Any = None
) -> None:
    """NotImplementedError that names the first argument which asks for more than plain attention."""
    no_window = isinstance(window_size, Sequence) and tuple(window_size) == (-1, -1)
    asked = {
        "dropout_p": (dropout_p, dropout_p == 0.0, "0.0"),
        "window_size": (window_size, no_window, "(-1, -1)"),
        "softcap": (softcap, softcap == 0.0, "0.0"),
        "alibi_slopes": ("given", alibi_slopes is None, "None"),
    }
    for name, (value, plain, legal) in asked.items():
        if not plain:
            raise NotImplementedError(f"{name} = {value}: grouped attention is written for {legal} only")


def check_flags(**flags: Any) -> None:
    """ValueError unless each is True or False: what is merely true, such as "no", is a mistake."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} = {value!r}, but should be True or False")  # noqa: TRY004 - as of every argument


def scale_of(softmax_scale: Any, head_dim: int) -> float:
    """The scale of the scores; ValueError unless it is a finite number, or None for head_dim ** -0.5."""
    if softmax_scale is None:
        return float(head_dim**-0.5)
    # By a comparison, as torch.compile does not trace math.isfinite of a scale that changes.
    if not isinstance(softmax_scale, (int, float)) or not -math.inf < softmax_scale < math.inf:
        raise ValueError(
            f"softmax_scale = {softmax_scale!r}, but should be a finite number, or None for head_dim ** -0.5"
        )
    return softmax_scale


def check_shape(name: str, tensor: torch.Tensor, should: Sequence[int | None], source: str) -> None:
    """ValueError unless the tensor is [rows, heads, head_dim]; None is any size. source: what they follow from."""
    sizes = tuple(tensor.shape)
    if len(sizes) != len(should) or any(size not in (found, None) for found, size in zip(sizes, should, strict=True)):
        names = ("rows", "heads", "head_dim")
        told = ", ".join(name if size is None else str(size) for name, size in zip(names, should, strict=True))
        raise ValueError(f"{name}.shape = {sizes}, but should be ({told}){source}")


def check_alike(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor, *whats: str) -> None:
    """ValueError unless both are of one dtype and on one device, or have other such things in common."""
    for what in whats or ("dtype", "device"):
        value, should = getattr(tensor, what), getattr(other, what)
        if value != should:
            raise ValueError(f"{name}.{what} = {value}, but should be {should}, as of {other_name}")

"""What the tests of adapters share: a call that may not touch its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def unchanged(adapter: Callable[..., Tensors], **inputs: Any) -> Tensors:
    """What the adapter gives; its inputs must be as before, bit for bit, NaN included."""
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    given = adapter(**inputs)
    for name, value in before.items():
        assert torch.equal(_bits(inputs[name]), _bits(value)), f"{name} was changed"
    return given


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)

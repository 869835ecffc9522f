"""One number a head as the broadcast view that selective state updates take it for."""

from __future__ import annotations

import torch

from refgrid_groundtruth import Unavailable


def per_head(name: str, value: torch.Tensor, lead: int) -> torch.Tensor:
    """`value` with strides 0 beyond its first `lead` dimensions; Unavailable("unsupported") where it differs there."""
    first = value[(..., *[slice(1)] * (value.ndim - lead))]
    if not bool((value == first).all()):
        raise Unavailable("unsupported", f"{name} differs within a head, and the kernel takes one number a head")
    return first.contiguous().expand_as(value)


def demand_no_padding(state_batch_indices: torch.Tensor) -> None:
    """Raise Unavailable("unsupported") where a sequence is padding: kernels write no defined output for it."""
    count = int((state_batch_indices < 0).sum())
    if count:
        raise Unavailable("unsupported", f"{count} of the slots are padding, whose output the kernel does not define")

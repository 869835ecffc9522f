"""What the kernels of selective state updates want and give, for adapters to translate."""

from __future__ import annotations

import torch

from refgrid_groundtruth import Unavailable


def per_head(name: str, value: torch.Tensor, lead: int) -> torch.Tensor:
    """`value` with strides 0 beyond its first `lead` dimensions; Unavailable("unsupported") where it differs there."""
    first = value[(..., *[slice(1)] * (value.ndim - lead))]
    if not bool((value == first).all()):
        raise Unavailable("unsupported", f"{name} differs within a head, and the kernel takes one number a head")
    return first.contiguous().expand_as(value)


def given(output: torch.Tensor, new_state: torch.Tensor, state_batch_indices: torch.Tensor) -> dict[str, torch.Tensor]:
    """The definition's outputs among those of a kernel: without `output` where sequences are padding.

    Kernels skip the state of padding, but write the output of a state of zeros, where the definition has 0.
    """
    padded = bool((state_batch_indices < 0).any())
    return {"new_state": new_state} if padded else {"output": output, "new_state": new_state}


def demand_no_padding(state_batch_indices: torch.Tensor) -> None:
    """Raise Unavailable("unsupported") for a library that knows no padding."""
    count = int((state_batch_indices < 0).sum())
    if count:
        raise Unavailable("unsupported", f"{count} of {len(state_batch_indices)} sequences are padding")

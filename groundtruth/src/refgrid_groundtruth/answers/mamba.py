"""A state update in which decay, step and sums are round numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

HEADS, WIDTH, STATES, GROUPS, SLOTS = 8, 64, 128, 2, 4


def _mamba_ssu_decode() -> Answer:
    """Two sequences in slots 3 and 1 of four. dt + dt_bias is where softplus gives 1, and A = -log 2 halves a state.

    Slot 3 holds 4, slot 1 holds -2, the others 7. x is 3 and 1; B is 1 in the first half of the states and 0 behind; C
    is 1/64 in the first group and 1/32 in the second; D is 2 in even heads and 0 in odd ones. Halves of the states
    become 2 + 3 = 5 and 2, and -1 + 1 = 0 and -1; so s C is 5 + 2 = 7 and -1 in the first group of heads, 14 and -2 in
    the second, and D x adds 6 and 2 in even heads.
    """
    bfloat16 = torch.bfloat16
    state = torch.full((SLOTS, HEADS, WIDTH, STATES), 7.0, dtype=bfloat16)
    state[3], state[1] = 4.0, -2.0
    x = torch.tensor([3.0, 1.0], dtype=bfloat16).view(2, 1, 1).expand(2, HEADS, WIDTH).contiguous()
    one = math.log(math.e - 1)  # softplus(one) = 1
    b = torch.zeros(2, GROUPS, STATES, dtype=bfloat16)
    b[:, :, : STATES // 2] = 1.0
    skip = torch.tensor([2.0, 0.0], dtype=bfloat16).repeat(HEADS // 2)[:, None].expand(HEADS, WIDTH).contiguous()
    given = {
        "state": state,
        "x": x,
        "dt": torch.full((2, HEADS, WIDTH), one - 0.5, dtype=bfloat16),
        "A": torch.full((HEADS, WIDTH, STATES), -math.log(2)),
        "B": b,
        "C": torch.tensor([1 / 64, 1 / 32], dtype=bfloat16)[:, None].expand(2, GROUPS, STATES).contiguous(),
        "D": skip,
        "dt_bias": torch.full((HEADS, WIDTH), 0.5, dtype=bfloat16),
        "state_batch_indices": torch.tensor([3, 1], dtype=torch.int32),
    }
    read = torch.tensor([[7.0, 14.0], [-1.0, -2.0]]).repeat_interleave(HEADS // GROUPS, dim=1)[:, :, None]
    output = read + skip.float() * x.float()
    new_state = state.clone()
    new_state[3, ..., : STATES // 2], new_state[3, ..., STATES // 2 :] = 5.0, 2.0
    new_state[1, ..., : STATES // 2], new_state[1, ..., STATES // 2 :] = 0.0, -1.0
    return given, {"output": output.to(bfloat16), "new_state": new_state}


CASES: dict[str, Callable[[], Answer]] = {"mamba_ssu_decode": _mamba_ssu_decode}

"""What the tests of large sizes on a GPU hold, where there is none: memory is counted in tensors, runs are small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grouped_layouts import Subject, layouts, run_both
from grouped_memory import check_memory
from grouped_samples import hold_same_bits

from refgrid_solutions.grouped_attention.backends import naive

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUT = layouts(8)["zigzag"]
PLAIN = Subject("reference", head_dim=16)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """All that is taken for memory of a GPU."""
    held: list[torch.Tensor] = []
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 512 * len(held))
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return held


@pytest.mark.parametrize(("step", "planning"), [("forward", False), ("backward", False), ("metadata", True)])
def test_a_step_that_keeps_a_tensor_is_seen(
    step: str, planning: bool, kept: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    true = getattr(naive, step)

    def leaking(*told: Any) -> Any:
        kept.append(torch.empty(1))
        return true(*told)

    check_memory(LAYOUT, PLAIN, planning=planning)
    monkeypatch.setattr(naive, step, leaking)

    with pytest.raises(AssertionError, match="bytes after 100 calls"):
        check_memory(LAYOUT, PLAIN, planning=planning)


@pytest.mark.parametrize("name", ["out", "lse", "dq", "dk", "dv"])
def test_one_bit_that_differs_the_second_time_is_seen(name: str) -> None:
    once, again = (run_both(LAYOUT, PLAIN) for _ in range(2))
    hold_same_bits(once, again)
    changed = getattr(again, name).clone()
    changed[0, 0] = torch.nextafter(changed[0, 0], changed[0, 0] + 1)

    with pytest.raises(AssertionError, match=f"elements of {name} have other bits"):
        hold_same_bits(once, again._replace(**{name: changed}))

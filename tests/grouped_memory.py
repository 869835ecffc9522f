"""What a grouped attention holds of a GPU's memory after few and after many calls."""

from __future__ import annotations

import torch
from grouped_layouts import Layout, Subject, drawn, planned

from refgrid_solutions.grouped_attention import grouped_flash_attn_func


def check_memory(layout: Layout, subject: Subject, *, planning: bool) -> None:
    """As many bytes, held and at most held, after 100 forward and backward passes as after 3; planning: a plan each."""
    allocated_after(1, layout, subject, planning=planning)  # what a first call keeps for good, such as a workspace
    many, few = (allocated_after(count, layout, subject, planning=planning) for count in (100, 3))

    assert many == few, f"{many} bytes after 100 calls, now and at most, but {few} after 3"


def allocated_after(count: int, layout: Layout, subject: Subject, *, planning: bool) -> tuple[int, int]:
    """Bytes held, and at most held, after so many forward and backward passes."""
    leaves = [tensor.requires_grad_() for tensor in drawn(layout, subject)]
    dout, plan = torch.randn_like(leaves[0]), planned(layout, subject)
    _let_go(subject.device)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(count):
        plan = planned(layout, subject) if planning else plan
        out, _ = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend=subject.backend)
        torch.autograd.grad(out, leaves, dout)
        del out
        _let_go(subject.device)
    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def _let_go(device: str) -> None:
    """Autograd's thread holds what a pass has saved until it has begun with another: a tiny one."""
    torch.ones(1, device=device, requires_grad=True).sum().backward()
    torch.cuda.synchronize()

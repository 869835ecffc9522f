"""What every backend of grouped attention must show, on any device: bodies of the tests on the CPU and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from grouped_gradients import (
    check_gradients_in_another_order,
    check_separate_gradients,
    check_summed_gradients,
    check_summed_in_float32,
)
from grouped_layouts import (
    Layout,
    Subject,
    drawn,
    drawn_like,
    moved_rows,
    parts,
    planned,
    run,
    run_backward,
    run_both,
)
from grouped_samples import Tensors, hold_keys, hold_lse, hold_rows
from naive_grouped import Entry, attend, dense_mask, flash, gradients, hold_to_twice

from refgrid_solutions.grouped_attention import grouped_flash_attn_func


def check_precision(layout: Layout, subject: Subject, spread: float = 1, **options: Any) -> None:
    """out, lse, dq, dk and dv by the rule of twice the error, against float64.

    The error is that of the formula in the tensors' dtype; of large scores, that of a flash kernel, at least twice.
    """
    told = drawn(layout, subject, spread=spread)
    plan, mask = planned(layout, subject, **options), dense_mask(layout.entries, *layout[1:], subject.device)
    dout, scale = drawn_like(told[0]), subject.head_dim**-0.5
    out, lse = run(told, plan, subject)
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), run_backward(told, plan, subject, dout), strict=True))}

    truth, truth_lse = attend(*_double(told), mask, scale)
    truths = (truth, *gradients(*_double(told), mask, scale, dout.double()))
    large = spread > 1
    by_row = {"out"} if large else {"out", "dv"}  # few keys then have weights that a dtype can hold
    for (name, value), low, truth in zip(found.items(), _lows(told, mask, dout, large=large), truths, strict=True):
        factor = 3 if name in {"dk", "dv"} else 2
        hold_to_twice(name, value, low, truth, largest=factor, rms=2 if large else 1.5, by_row=name in by_row)
    hold_lse(lse, truth_lse)


def _lows(told: Tensors, mask: torch.Tensor, dout: torch.Tensor, *, large: bool) -> tuple[torch.Tensor, ...]:
    """out, dq, dk and dv with the roundings that are allowed."""
    scale = told[0].shape[2] ** -0.5
    if large:
        out, _, *of_inputs = flash(*told, mask, scale, dout)
        return out, *of_inputs
    return attend(*told, mask, scale)[0], *gradients(*told, mask, scale, dout)


def check_rows_without_keys(layout: Layout, subject: Subject) -> None:
    """They give 0 and -inf and zero gradients, and nothing else does; keys that no row sees have none either."""
    told, plan = drawn(layout, subject), planned(layout, subject)
    mask = dense_mask(layout.entries, *layout[1:], subject.device)
    blind, unseen = ~mask.any(1), ~mask.any(0)
    out, lse = run(told, plan, subject)
    dq, dk, dv = run_backward(told, plan, subject, drawn_like(out))

    assert not out[blind].any()
    assert torch.equal(lse.isneginf(), blind.expand_as(lse))
    for name, gradient, none in (("dq", dq, blind), ("dk", dk, unseen), ("dv", dv, unseen)):
        assert gradient.isfinite().all(), f"{name} is not finite everywhere"
        assert not gradient[none].any(), f"{name} is not zero for rows or keys that see or are seen by none"


def check_visible_counts(layout: Layout, subject: Subject) -> None:
    """q = 0 makes lse the logarithm of how many keys a row sees, exact to one key, and out the mean of their v."""
    q, k, v = drawn(layout, subject)
    out, lse = run((torch.zeros_like(q), k, v), planned(layout, subject), subject)
    mask = dense_mask(layout.entries, *layout[1:], subject.device)
    counts = mask.sum(1)

    assert torch.equal(lse.double().exp().round().long(), counts.expand_as(lse))
    values = v.double().repeat_interleave(subject.heads[0] // subject.heads[1], dim=1)
    mean = torch.einsum("nm,mhd->nhd", mask.double(), values) / counts.clamp(min=1)[:, None, None]
    assert (out.double() - mean).abs().max() <= 2 * torch.finfo(subject.dtype).eps * max(1, float(mean.abs().max()))


def check_visible_counts_of_rows(layout: Layout, subject: Subject) -> None:
    """As visible counts, for any length: the counts come from the bounds of the slices, and out is not looked at."""
    q, k, v = drawn(layout, subject)
    _, lse = run((torch.zeros_like(q), k, v), planned(layout, subject), subject)
    counts = torch.zeros(layout.total_q, dtype=torch.long, device=subject.device)
    for q_start, q_end, k_start, k_end, mask_type in layout.entries:
        hidden = torch.arange(q_end - q_start - 1, -1, -1, device=subject.device) * mask_type
        counts[q_start:q_end] = (k_end - k_start - hidden).clamp(min=0)

    assert torch.equal(lse.double().exp().round().long(), counts.expand_as(lse))


def check_needles(layout: Layout, subject: Subject) -> None:
    """One key that outweighs all, at the last visible and the first hidden place of rows of every slice.

    Where its row sees it, lse is its score; elsewhere the logarithm of the other keys' count.
    """
    plan, mask = planned(layout, subject), dense_mask(layout.entries, *layout[1:], subject.device)
    q, k, v = (torch.zeros_like(tensor) for tensor in drawn(layout, subject))
    q[..., 0] = 1
    strength = 20.0
    for place in sorted(_edges(layout)):
        k[place, :, 0] = strength * subject.head_dim**0.5
        _, lse = run((q, k, v), plan, subject)
        sees = mask[:, place].double()
        expected = (mask.sum(1) - sees + sees * math.exp(float(k[place, 0, 0]) * subject.head_dim**-0.5)).log()
        torch.testing.assert_close(lse.double(), expected.expand_as(lse), rtol=1e-5, atol=1e-4)
        k[place] = 0


def _edges(layout: Layout) -> set[int]:
    """Keys at, before and after the bounds of what the first, a middle and the last row of each slice see."""
    places = set()
    for q_start, q_end, k_start, k_end, mask_type in layout.entries[:: max(1, len(layout.entries) // 6)]:
        for row in {q_start, (q_start + q_end) // 2, q_end - 1} if q_start < q_end else set():
            end = min(k_end, k_end + row + 1 - q_end) if mask_type else k_end
            places |= {k_start - 1, k_start, end - 1, end}
    return {place for place in places if 0 <= place < layout.total_k}


def check_separate_calls(layout: Layout, subject: Subject) -> None:
    """The same bits as a call of the same backend for each slice, on its rows and keys alone."""
    told = drawn(layout, subject)
    out, lse = run(told, planned(layout, subject, max_splits=1), subject)
    for rows, keys, alone in parts(layout):
        own = told[0][rows], told[1][keys], told[2][keys]
        found = run(own, planned(alone, subject, max_splits=1), subject)

        assert torch.equal(out[rows], found[0]), f"out of {alone} is not that of a call of its own"
        assert torch.equal(lse[:, rows], found[1])


def check_order_of_slices(layout: Layout, subject: Subject) -> None:
    """Told in another order, and with the rows themselves in another order, out and lse are the same bits."""
    told = drawn(layout, subject)
    out, lse = run(told, planned(layout, subject, max_splits=1), subject)
    reordered = list(reversed(layout.entries))
    again = run(told, planned(layout, subject, reordered, max_splits=1), subject)
    moved, order = moved_rows(reordered)
    rows = torch.tensor(order, dtype=torch.long, device=subject.device)
    there = Layout(moved, len(order), layout.total_k)
    moved_out, moved_lse = run((told[0][rows], *told[1:]), planned(there, subject, max_splits=1), subject)

    assert torch.equal(out, again[0])
    assert torch.equal(lse, again[1])
    assert torch.equal(out[rows], moved_out)
    assert torch.equal(lse[:, rows], moved_lse)


def check_split_slices(layout: Layout, subject: Subject) -> None:
    """Each slice cut in two gives what the whole gives, to a rounding."""
    told = drawn(layout, subject)
    dout = drawn_like(told[0])
    halves = [half for entry in layout.entries for half in _halves(entry)]
    whole, cut = planned(layout, subject), planned(layout, subject, halves)
    expected, found = run(told, whole, subject), run(told, cut, subject)
    pairs = zip(run_backward(told, cut, subject, dout), run_backward(told, whole, subject, dout), strict=True)

    for one, other in [(found[0], expected[0]), *pairs]:
        assert (one.double() - other.double()).abs().max() <= 4 * torch.finfo(subject.dtype).eps * other.abs().max()
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def _halves(entry: Entry) -> list[Entry]:
    q_start, q_end, k_start, k_end, mask_type = entry
    middle = (q_start + q_end) // 2
    seen = max(k_start, k_end - (q_end - middle)) if mask_type else k_end
    return [(q_start, middle, k_start, seen, mask_type), (middle, q_end, k_start, k_end, mask_type)]


def check_poisoned_keys(layout: Layout, subject: Subject) -> None:
    """What the keys in no range hold, and memory that is not written yet, changes no bit."""
    told, plan = drawn(layout, subject), planned(layout, subject, deterministic=True)
    dout = drawn_like(told[0])
    in_ranges = torch.zeros(layout.total_k, dtype=torch.bool, device=subject.device)
    for entry in layout.entries:
        in_ranges[entry[2] : entry[3]] = True
    expected = (*run(told, plan, subject), *run_backward(told, plan, subject, dout))
    poisoned = [
        torch.where(in_ranges[:, None, None], keys, value) for keys, value in zip(told[1:], (1e4, -1e4), strict=True)
    ]
    there: Tensors = (told[0], poisoned[0].to(subject.dtype), poisoned[1].to(subject.dtype))

    for one, other in zip(
        (*run(there, plan, subject), *run_backward(there, plan, subject, dout)), expected, strict=True
    ):
        assert torch.equal(one, other)


def check_deterministic(layout: Layout, subject: Subject) -> None:
    """A plan that is told so gives gradients of the same bits twice."""
    told, plan = drawn(layout, subject), planned(layout, subject, deterministic=True)
    dout = drawn_like(told[0])
    once, again = (run_backward(told, plan, subject, dout) for _ in range(2))

    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def check_strides(layout: Layout, subject: Subject) -> None:
    """Rows of a packed tensor, heads before rows, and a gradient that is one number give what dense copies give."""
    q, k, v = drawn(layout, subject)
    plan = planned(layout, subject, deterministic=True, max_splits=1)
    packed = torch.cat([k, v], dim=1)
    k_there, v_there = packed.split(subject.heads[1], dim=1)
    q_there = q.transpose(0, 1).contiguous().transpose(0, 1)
    dout = torch.ones((), dtype=subject.dtype, device=subject.device).expand_as(q)
    expected = (*run((q, k, v), plan, subject), *run_backward((q, k, v), plan, subject, dout.contiguous()))

    leaves = [tensor.detach().requires_grad_() for tensor in (q_there, k_there, v_there)]
    out, lse = grouped_flash_attn_func(leaves[0], leaves[1], leaves[2], plan, backend=subject.backend)
    found = (out, lse, *torch.autograd.grad(out, leaves, dout))

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def check_sampled_rows(layout: Layout, subject: Subject, spread: float = 1) -> None:
    """As precision, row by row."""
    hold_rows(run_both(layout, subject, spread=spread), large=spread > 1)


def check_sampled_keys(layout: Layout, subject: Subject, spread: float = 1) -> None:
    """As precision of dk and dv, key by key."""
    hold_keys(run_both(layout, subject, spread=spread), large=spread > 1)


def check_compiled(layout: Layout, subject: Subject, compiler: str) -> None:
    """One graph, with its gradients, gives the same as eager."""
    plan = planned(layout, subject, deterministic=True)
    plan.prepare(subject.backend)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grouped_flash_attn_func(q, k, v, plan, backend=subject.backend)

    leaves = [tensor.requires_grad_() for tensor in drawn(layout, subject)]
    expected, found = step(*leaves), torch.compile(step, fullgraph=True, backend=compiler)(*leaves)
    dout = drawn_like(expected[0])

    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    pairs = (torch.autograd.grad(pair[0], leaves, dout) for pair in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


def _double(told: Tensors) -> Tensors:
    return told[0].double(), told[1].double(), told[2].double()


CHECKS: dict[str, Callable[[Layout, Subject], None]] = {
    "precision": check_precision,
    "rows without keys": check_rows_without_keys,
    "visible counts": check_visible_counts,
    "visible counts of rows": check_visible_counts_of_rows,
    "needles": check_needles,
    "separate calls": check_separate_calls,
    "summed gradients": check_summed_gradients,
    "summed in float32": check_summed_in_float32,
    "separate gradients": check_separate_gradients,
    "order of slices": check_order_of_slices,
    "gradients in another order": check_gradients_in_another_order,
    "split slices": check_split_slices,
    "poisoned keys": check_poisoned_keys,
    "deterministic": check_deterministic,
    "strides": check_strides,
    "sampled rows": check_sampled_rows,
    "sampled keys": check_sampled_keys,
}

# With inputs ten times as large; not of any layout, as where rows see few keys there is little but roundings.
LARGE: dict[str, Callable[[Layout, Subject], None]] = {
    "precision of large inputs": partial(check_precision, spread=10),
    "sampled rows of large inputs": partial(check_sampled_rows, spread=10),
    "sampled keys of large inputs": partial(check_sampled_keys, spread=10),
}

"""What gradients of a grouped call must show beside those of its slices: a part of the checks of every backend."""

from __future__ import annotations

import torch
from grouped_layouts import Layout, Subject, drawn, drawn_like, moved_rows, parts, planned, run_backward
from naive_grouped import Entry

# Whose dq of a slice is the same bits whatever else a call has. PyTorch's kernel, by which torch and fa3 go backward,
# sums it in more parts the fewer sequences and heads a launch has.
SAME_DQ = ("reference", "triton")
# Whose dk and dv are the same bits in whatever order slices are told: the reference sums them in that order.
SAME_SUMS = ("triton", "torch", "fa3")


def check_summed_gradients(layout: Layout, subject: Subject) -> None:
    """dk and dv are the sums of those of calls for each slice, to a rounding of each."""
    told = drawn(layout, subject)
    dout = drawn_like(told[0])
    _, dk, dv = run_backward(told, planned(layout, subject), subject, dout)
    sums = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in (dk, dv)]
    sizes = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in (dk, dv)]
    for entry in layout.entries:
        parts = run_backward(told, planned(layout, subject, [entry]), subject, dout)[1:]
        for total, size, part in zip(sums, sizes, parts, strict=True):
            total.add_(part.double())
            size.add_(part.double().abs())
    for found, total, size in zip((dk, dv), sums, sizes, strict=True):
        allowed = torch.finfo(subject.dtype).eps * (size + found.double().abs()) + 1e-3 * size.max()
        assert ((found.double() - total).abs() <= allowed).all()


def check_separate_gradients(layout: Layout, subject: Subject) -> None:
    """dq is that of a call for each slice, on its rows and keys alone, if the plans are deterministic.

    The same bits of the reference and triton; torch and fa3 do not promise it and are held to a rounding.
    """
    told = drawn(layout, subject)
    dout = drawn_like(told[0])
    dq, *_ = run_backward(told, planned(layout, subject, deterministic=True, max_splits=1), subject, dout)
    for rows, keys, alone in parts(layout):
        own = told[0][rows], told[1][keys], told[2][keys]
        found, *_ = run_backward(own, planned(alone, subject, deterministic=True, max_splits=1), subject, dout[rows])

        hold_same("dq of a slice", found, dq[rows], bits=subject.backend in SAME_DQ)


def check_gradients_in_another_order(layout: Layout, subject: Subject) -> None:
    """Told in another order, and with the rows themselves in another order, if the plans are deterministic.

    Told otherwise: dq is the same bits, dk and dv too but of the reference. Rows moved: dq is, of the reference and
    triton. No backend promises dk and dv of rows that were moved, as they are sums over rows in their order. What is
    not promised is held to a rounding.
    """
    told = drawn(layout, subject)
    dout = drawn_like(told[0])
    dq, *sums = run_backward(told, planned(layout, subject, deterministic=True, max_splits=1), subject, dout)
    reordered = list(reversed(layout.entries))
    again, *sums_again = run_backward(
        told, planned(layout, subject, reordered, deterministic=True, max_splits=1), subject, dout
    )
    moved, rows = moved_rows(reordered)
    there = planned(Layout(moved, len(rows), layout.total_k), subject, deterministic=True, max_splits=1)
    moved_dq, *sums_moved = run_backward((told[0][rows], *told[1:]), there, subject, dout[rows])

    hold_same("dq", again, dq, bits=True)
    hold_same("dq of moved rows", moved_dq, dq[rows], bits=subject.backend in SAME_DQ)
    for name, one, other, after in zip(("dk", "dv"), sums_again, sums, sums_moved, strict=True):
        hold_same(name, one, other, bits=subject.backend in SAME_SUMS)
        hold_same(f"{name} of moved rows", after, other, bits=False)


def hold_same(name: str, found: torch.Tensor, expected: torch.Tensor, *, bits: bool) -> None:
    """The same bits, or to a few roundings of the largest value."""
    if bits:
        assert torch.equal(found, expected), f"{name} has other bits"
    elif found.numel():
        allowed = 4 * torch.finfo(found.dtype).eps * expected.abs().max()
        assert (found.double() - expected.double()).abs().max() <= allowed, f"{name} is not the same to a rounding"


def check_summed_in_float32(layout: Layout, subject: Subject) -> None:
    """Of a slice that adds 2 / eps to dk and dv, and others that add 1 each, none is lost: in the dtype itself all are.

    Two keys outweigh all others, alike, and have the values 1 and -1: a row whose dout is 2 then adds 1 to both
    gradients of the one, and -1 to those of the other. The large slice is the first that was told, then the last.
    """
    place, slices = _most_shared(layout)
    large = 2 / torch.finfo(subject.dtype).eps
    q, k, v = (torch.zeros_like(tensor) for tensor in drawn(layout, subject))
    q[..., 0], k[place : place + 2, :, 0] = 1, 20
    v[place, :, 0], v[place + 1 : place + 2, :, 0] = 1, -1
    for entries in (slices, slices[::-1]):
        dout = torch.zeros_like(q)
        for number, entry in enumerate(entries):
            dout[entry[1] - 1, :: subject.heads[0] // subject.heads[1], 0] = 2 if number else 2 * large
        _, *found = run_backward((q, k, v), planned(layout, subject), subject, dout, scale=1)
        for name, gradient in zip(("dk", "dv"), found, strict=True):
            _hold_sum(name, gradient[place : place + 2, :, 0], large + len(slices) - 1 if slices else 0)


def _hold_sum(name: str, found: torch.Tensor, total: float) -> None:
    """To a rounding of 2 / eps and a little more, and what weights that are not quite one half leave."""
    off = (found.double().abs() - total).abs().max()
    assert off <= 1.05, f"{name} is off by {off:.3g}, but should be by at most 1, half a unit in the last place"


def _most_shared(layout: Layout) -> tuple[int, list[Entry]]:
    """A key that as many slices as possible see together with the next one; and those slices, as they were told."""

    def seeing(place: int) -> list[Entry]:
        return [entry for entry in layout.entries if entry[0] < entry[1] and entry[2] <= place < entry[3] - 1]

    return max(((place, seeing(place)) for place in range(layout.total_k)), key=lambda found: len(found[1]))

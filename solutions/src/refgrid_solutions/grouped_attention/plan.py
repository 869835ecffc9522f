"""All host work of a grouped attention, done once: the checks, the choice of a backend, what it needs on the device."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch

from refgrid_solutions.grouped_attention import backends
from refgrid_solutions.grouped_attention.arguments import check_flags
from refgrid_solutions.grouped_attention.ranges import (
    Columns,
    Numbers,
    Slice,
    check_heads,
    check_size,
    slices_from,
    visible_pairs,
)

# A work list is read by loads of up to 16 bytes: each part of one copy begins at such an address.
_ALIGNMENT = 16
_INT32 = 4


class Made(NamedTuple):
    """What a backend needs: for both passes, or for the forward pass alone."""

    both: bool
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class GroupedAttnPlan:
    """Which rows see which keys, for which tensors: made by plan_grouped_attn, used in any number of calls.

    host: int64 on the CPU, [deterministic, max_splits or 0, the columns]; all that a custom op must be told,
    so that it can make the plan again (rebuilt). auto_backends: what backend="auto" stands for where no gradient will
    be needed, and where one will.
    """

    total_q: int
    total_k: int
    num_heads_q: int
    num_heads_k: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    host: torch.Tensor
    auto_backends: tuple[str, str] = ("", "")
    _metadata: dict[str, Made] = field(default_factory=dict, repr=False)

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """As they were given, in that order."""
        return tuple(map(Slice, *self.columns))

    @property
    def table(self) -> torch.Tensor:
        """The same, as numbers [5, slices]."""
        return self.host[2:].view(5, (len(self.host) - 2) // 5)

    @cached_property
    def columns(self) -> Columns:
        """The same, as numbers of Python."""
        columns: Columns = self.table.tolist()
        return columns

    @cached_property
    def in_order(self) -> list[Numbers]:
        """The same, in the order of rows."""
        return sorted(zip(*self.columns, strict=True))

    @cached_property
    def seeing(self) -> list[Numbers]:
        """Those of which some row sees some key, in that order."""
        return [piece for piece in self.in_order if piece[0] < piece[1] and piece[2] < piece[3]]

    @property
    def deterministic(self) -> bool:
        """Whether the gradients must be the same bits every time."""
        return bool(self.host[0])

    @property
    def max_splits(self) -> int | None:
        """How many parts a row's keys may be split into; None leaves it to the backend, 1 forbids it."""
        return int(self.host[1]) or None

    @property
    def forward_flops(self) -> int:
        """Floating point operations of the two products over pairs that are visible; nothing for the softmax."""
        return 4 * self.head_dim * self.num_heads_q * sum(map(visible_pairs, *self.columns))

    @property
    def backward_flops(self) -> int:
        """Those of the five products of a backward pass that computes the scores anew."""
        return self.forward_flops * 5 // 2

    def prepare(self, backend: str = "auto", *, backward: bool | None = None) -> str:
        """Make what the backend needs on the device, once, and give the backend's name.

        backward: whether gradients will be needed. "auto" stands for the fastest with them if True, else without. If
        False, only what the forward pass needs is made. A first call with a backend does this by itself, but not while
        a CUDA graph is captured (RuntimeError) nor inside torch.compile(fullgraph=True). The copy to the device is on
        the current stream, for which any other that runs the plan has to wait. ValueError if there is no such backend
        or it cannot run this plan.
        """
        name, both = self.auto_backends[backward is True] if backend == "auto" else backend, backward is not False
        made = self._metadata.get(name)
        if made is None or (both and not made.both):
            self._metadata[name] = Made(both, _uncompiled(self, name, both))
        return name

    def metadata(self, backend: str) -> tuple[torch.Tensor, ...]:
        """Tensors that the backend's function of this name made; of the forward pass, if prepare was not called."""
        return self._metadata[self.prepare(backend, backward=False)].tensors


def plan_grouped_attn(
    q_ranges: Sequence[Sequence[int]],
    k_ranges: Sequence[Sequence[int]],
    mask_types: Sequence[int],
    *,
    total_q: int,
    total_k: int,
    num_heads_q: int,
    num_heads_k: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
    deterministic: bool = False,
    max_splits: int | None = None,
    backend: str = "auto",
    backward: bool | None = None,
) -> GroupedAttnPlan:
    """Check the slices, and plan attention of q [total_q, num_heads_q, head_dim] to k, v [total_k, num_heads_k, ...].

    q_ranges, k_ranges: sequences or integer tensors [n, 2] of half-open ranges; mask_types [n]: FULL = 0, or CAUSAL
    = 1, in which row i of a slice sees its key j where j <= i + n_k - n_q. Rows of q may be in one slice at most, keys
    in any number. deterministic: gradients of the same bits every time. max_splits: how many parts the keys of a row
    may be split into (1 = never, None = the backend's choice). backend, backward: which to make ready (prepare), for
    calls with gradients (True), without (False) or either (None). ValueError for what is not legal, naming the entry.
    """
    check_heads(num_heads_q, num_heads_k, head_dim)
    check_flags(deterministic=deterministic)
    if backward is not None:
        check_flags(backward=backward)
    if max_splits is not None:
        check_size("max_splits", max_splits, smallest=1)
    columns = slices_from(q_ranges, k_ranges, mask_types, total_q, total_k)
    host = host_ints([deterministic, max_splits or 0, *chain(*columns)])
    sizes = (total_q, total_k, num_heads_q, num_heads_k, head_dim, dtype, _with_index(torch.device(device)))
    plan = GroupedAttnPlan(*sizes, host, backends.choose(GroupedAttnPlan(*sizes, host)))
    vars(plan)["columns"] = columns  # which the property would find again
    if backend == "auto":
        backends.say(plan.auto_backends)
    for needed in (True, False) if backward is None else (backward,):
        plan.prepare(backend, backward=needed)
    return plan


def rebuilt(
    q: torch.Tensor, k: torch.Tensor, host: torch.Tensor, backend: str, metadata: Sequence[torch.Tensor]
) -> GroupedAttnPlan:
    """The plan inside a custom op, from what the op was given: q and k for the sizes, and the plan's own tensors."""
    sizes = (q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], q.dtype, q.device)
    return GroupedAttnPlan(*sizes, host, (backend, backend), {backend: Made(True, tuple(metadata))})


def host_ints(numbers: Sequence[int]) -> torch.Tensor:
    """Int64, on the CPU; through an array, as torch.tensor takes several times as long for a list."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def device_ints(device: torch.device, *parts: memoryview) -> list[torch.Tensor]:
    """Each part as an int32 tensor on the device, by one copy for all; each begins at a multiple of 16 bytes.

    parts: 32-bit integers, of any shape, dense. The host waits for the device at no time.
    """
    # Joined as bytes: a copy of each part into its place in a tensor would be two operations of torch a part.
    together, starts = bytearray(), list[int]()
    for part in parts:
        starts.append(len(together) // _INT32)
        together += part
        together += bytes(-len(together) % _ALIGNMENT)
    here = torch.frombuffer(together, dtype=torch.int32) if together else torch.empty(0, dtype=torch.int32)
    here = here.pin_memory() if device.type == "cuda" else here
    there = here.to(device, non_blocking=True)
    steps = ([step // _INT32 for step in part.strides or ()] for part in parts)
    return [there.as_strided(part.shape, *where) for part, *where in zip(parts, steps, starts, strict=True)]


def _made_metadata(plan: GroupedAttnPlan, backend: str, both: bool) -> tuple[torch.Tensor, ...]:
    if backend not in plan.auto_backends and (reason := backends.refusal(backend, plan)):
        raise ValueError(f"backend = {backend!r} cannot run this plan: {reason}")
    if plan.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"plan.prepare({backend!r}) copies to the device: call it before a CUDA graph is captured")
    return tuple(backends.load(backend).metadata(plan, both))


def _with_index(device: torch.device) -> torch.device:
    """The device that tensors made on it will name."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# Not part of a compiled graph: lists become tensors here, and libraries are imported.
_uncompiled = torch.compiler.disable(_made_metadata, reason="call plan.prepare(backend) before this is compiled whole")

"""Ranks as threads of one process: each makes its own calls, and what passes between them is what processes would pass.

Needs torch only. A collective brings nothing before it was waited for: until then its result is NaN. What a rank sends
may not change meanwhile, and all must send alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from refgrid_solutions.grouped_attention.zigzag import Exchange

T = TypeVar("T")


class Ranks:
    """So many ranks, and the place where they meet."""

    def __init__(self, world_size: int, limit: float = 120) -> None:
        self.world_size = world_size
        self.barrier = threading.Barrier(world_size, timeout=limit)
        self.slots: list[Any] = [None] * world_size

    def meet(self, rank: int, told: Any) -> list[Any]:
        """What every rank told, once all have."""
        self.slots[rank] = told
        self.barrier.wait()
        heard = list(self.slots)
        self.barrier.wait()
        return heard


@dataclass(frozen=True)
class EmulatedExchange(Exchange):
    """One rank's way to the others."""

    ranks: Ranks
    number: int

    @property
    def rank(self) -> int:
        return self.number

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Arrival:
        assert whole.shape == (self.world_size * len(part), *part.shape[1:]), "the gathered tensor has another size"
        parts = self._swapped("gather", part)
        return Arrival(whole, part, parts[self.number], torch.cat(parts))

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> Arrival:
        assert whole.shape == (self.world_size * len(part), *part.shape[1:]), "the part has another size"
        wholes = self._swapped("reduce_scatter", whole)
        mine = slice(self.number * len(part), (self.number + 1) * len(part))
        total = torch.stack([one[mine] for one in wholes]).sum(0)
        return Arrival(part, whole, wholes[self.number], total)

    def _swapped(self, name: str, sent: torch.Tensor) -> list[torch.Tensor]:
        heard = self.ranks.meet(self.number, (name, sent.dtype, sent.shape, sent.clone()))
        calls = {told[:3] for told in heard}
        assert len(calls) == 1, f"ranks call each other for different things: {calls}"
        assert sent.is_contiguous(), f"NCCL refuses to {name} a tensor with gaps"
        return [told[3] for told in heard]


@dataclass(frozen=True)
class LoneExchange(Exchange):
    """One rank alone, to be timed: the others are taken to hold what it holds, and to give no gradients.

    A gather fills its buffer by a copy on the device. What a network takes is not in the time.
    """

    number: int
    size: int

    @property
    def rank(self) -> int:
        return self.number

    @property
    def world_size(self) -> int:
        return self.size

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Done:
        whole.view(self.size, *part.shape).copy_(part)
        return Done()

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> Done:
        part.copy_(whole.view(self.size, *part.shape)[self.number])
        return Done()


class Done:
    """Nothing to wait for."""

    def wait(self) -> None:
        pass


class Arrival:
    """A collective under way."""

    def __init__(self, target: torch.Tensor, sent: torch.Tensor, as_sent: torch.Tensor, arrives: torch.Tensor) -> None:
        self._told = target, sent, as_sent, arrives
        target.fill_(torch.nan)

    def wait(self) -> None:
        target, sent, as_sent, arrives = self._told
        assert torch.equal(sent, as_sent), "what was sent has changed before it was waited for"
        target.copy_(arrives)


def emulated(world_size: int, run: Callable[[Exchange], T], limit: float = 120) -> list[T]:
    """What run gives for each rank; the first failure that is no other's consequence is raised."""
    ranks = Ranks(world_size, limit)

    def rank(number: int) -> T:
        # Backward passes of a GPU share one thread otherwise, in which ranks would wait for each other in vain.
        with torch.autograd.set_multithreading_enabled(False):
            try:
                return run(EmulatedExchange(ranks, number))
            except BaseException:
                ranks.barrier.abort()
                raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(rank, number) for number in range(world_size)]
    errors = [error for future in futures if (error := future.exception())]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]

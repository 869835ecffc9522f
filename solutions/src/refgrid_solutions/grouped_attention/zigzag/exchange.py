"""What a rank needs of the others: keys gathered from all, gradients summed over all. Nothing else crosses ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist


class Pending(Protocol):
    """A collective that has begun. Its tensors must stay alive, and unread, until it was waited for."""

    def wait(self) -> Any:
        """Let what comes after see the result; on a GPU its stream waits, and the host does not."""


class Exchange(ABC):
    """The ranks that share sequences, and what passes between them; every rank makes the same calls in one order."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """Which of them this is, from 0."""

    @property
    @abstractmethod
    def world_size(self) -> int:
        """How many they are."""

    @abstractmethod
    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Pending:
        """Begin to fill whole [world_size * n, ...] with the part [n, ...] of every rank, in the order of ranks."""

    @abstractmethod
    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> Pending:
        """Begin to fill part [n, ...] with the sum over ranks of their whole [world_size * n, ...] at its place."""


@dataclass(frozen=True)
class ProcessGroupExchange(Exchange):
    """By a process group of torch.distributed, NCCL's or Gloo's; None is the default group."""

    group: dist.ProcessGroup | None

    @property
    def rank(self) -> int:
        """Of this process in the group."""
        return int(dist.get_rank(self.group))

    @property
    def world_size(self) -> int:
        """Processes in the group."""
        return int(dist.get_world_size(self.group))

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Pending:
        """As declared."""
        pending: Pending = _named("all_gather_single", "all_gather_into_tensor")(
            whole, part, group=self.group, async_op=True
        )
        return pending

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> Pending:
        """As declared."""
        pending: Pending = _named("reduce_scatter_single", "reduce_scatter_tensor")(
            part, whole, group=self.group, async_op=True
        )
        return pending


def exchange_of(group: dist.ProcessGroup | Exchange | None) -> Exchange:
    """The group itself if it is an exchange, as where ranks are emulated in one process."""
    return group if isinstance(group, Exchange) else ProcessGroupExchange(group)


def _named(since_2_13: str, before: str) -> Callable[..., Any]:
    """A collective of torch.distributed, by the name that does not warn."""
    found: Callable[..., Any] = getattr(dist, since_2_13 if hasattr(dist, since_2_13) else before)
    return found

"""Ranks emulated in one process: they see the faults that processes would die of."""

from __future__ import annotations

import threading

import pytest
import torch
from emulated_ranks import EmulatedExchange, LoneExchange, Ranks, emulated
from zigzag_checks import Case, Tensors, drawn, run_rank

from refgrid_solutions.grouped_attention import zigzag_shard
from refgrid_solutions.grouped_attention.zigzag import Exchange


def test_a_collective_of_emulated_ranks_brings_nothing_before_it_was_waited_for() -> None:
    def gather(exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor]:
        whole = torch.zeros(2)
        pending = exchange.gather(whole, torch.full((1,), float(exchange.rank)))
        early = whole.clone()
        pending.wait()
        return early, whole

    for early, late in emulated(2, gather):
        assert early.isnan().all()
        assert late.tolist() == [0.0, 1.0]


def test_emulated_ranks_may_not_touch_what_they_sent() -> None:
    def gather(exchange: Exchange) -> None:
        part = torch.zeros(1)
        pending = exchange.gather(torch.zeros(2), part)
        part += 1
        pending.wait()

    with pytest.raises(AssertionError, match="what was sent has changed before it was waited for"):
        emulated(2, gather)


def test_emulated_ranks_must_call_alike_and_in_time() -> None:
    with pytest.raises(AssertionError, match="ranks call each other for different things"):
        emulated(2, lambda e: e.gather(torch.zeros(2 + 2 * e.rank), torch.zeros(1 + e.rank)))
    with pytest.raises(threading.BrokenBarrierError):
        EmulatedExchange(Ranks(2, limit=0.1), 0).gather(torch.zeros(2), torch.zeros(1))


def test_the_failure_of_a_rank_is_raised_and_not_that_others_waited_for_it() -> None:
    def run(exchange: Exchange) -> None:
        if exchange.rank == 1:
            raise LookupError("of rank 1")
        exchange.gather(torch.zeros(3), torch.zeros(1))

    with pytest.raises(LookupError, match="of rank 1"):
        emulated(3, run)


def test_a_rank_alone_attends_as_among_others_that_hold_what_it_holds() -> None:
    case, rank, world_size = Case([16, 48], stride=1), 1, 4
    own = [zigzag_shard(tensor, case.cu_seqlens, rank, world_size) for tensor in drawn(case)]
    alike: Tensors = tuple(_dealt(tensor, case, world_size) for tensor in own)

    found = run_rank(case, alike, LoneExchange(rank, world_size), rank, world_size)
    among = emulated(world_size, lambda exchange: run_rank(case, alike, exchange, exchange.rank, world_size))[rank]

    assert all(torch.equal(one, other) for one, other in zip(found[:3], among[:3], strict=True))


def _dealt(own: torch.Tensor, case: Case, world_size: int) -> torch.Tensor:
    """Whole sequences of which every rank is dealt the same."""
    whole = own.new_empty(case.cu_seqlens[-1], *own.shape[1:])
    places = torch.arange(len(whole))
    for rank in range(world_size):
        whole[zigzag_shard(places, case.cu_seqlens, rank, world_size)] = own
    return whole

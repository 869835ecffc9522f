"""The zigzag layout against a simulation that moves tokens one by one."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from refgrid_solutions.grouped_attention import zigzag_llama3_prepare, zigzag_shard, zigzag_unshard
from refgrid_solutions.grouped_attention.zigzag.layout import EARLY, LATE, Layout, layout_of

layouts = st.builds(
    lambda lengths, world_size, rank: Layout(tuple(lengths), rank % world_size, world_size),
    st.lists(st.integers(0, 4), min_size=1, max_size=4),
    st.integers(1, 6),
    st.integers(0, 5),
)
Token = tuple[int, int]  # of a sequence, its number in it


def offsets(layout: Layout) -> list[int]:
    return [0, *accumulate(2 * layout.world_size * length for length in layout.chunk_lengths)]


def true_tokens(layout: Layout) -> list[Token]:
    """All tokens, sequence after sequence."""
    return [
        (sequence, token)
        for sequence, length in enumerate(layout.chunk_lengths)
        for token in range(2 * layout.world_size * length)
    ]


def tokens_of(layout: Layout, rank: int) -> list[Token]:
    """Dealt out by hand: of each sequence those of chunk rank, then those of chunk 2 W - 1 - rank."""
    held = []
    for sequence, length in enumerate(layout.chunk_lengths):
        for chunk in (rank, 2 * layout.world_size - 1 - rank):
            held += [(sequence, chunk * length + i) for i in range(length)]
    return held


def expanded(ranges: list[tuple[int, int]]) -> list[int]:
    return [number for start, end in ranges for number in range(start, end)]


@given(layouts)
def test_a_shard_holds_the_tokens_that_were_dealt_to_its_rank(layout: Layout) -> None:
    every, cu_seqlens = true_tokens(layout), offsets(layout)

    held = zigzag_shard(torch.arange(len(every)), cu_seqlens, layout.rank, layout.world_size)

    assert [every[place] for place in held.tolist()] == tokens_of(layout, layout.rank)
    assert layout_of("cu_seqlens", cu_seqlens, layout.rank, layout.world_size) == layout


@given(layouts, st.integers(0, 1))
def test_all_shards_together_are_the_whole(layout: Layout, dim: int) -> None:
    x = torch.randn((offsets(layout)[-1], 2) if dim == 0 else (2, offsets(layout)[-1]))
    parts = [zigzag_shard(x, offsets(layout), rank, layout.world_size, dim=dim) for rank in range(layout.world_size)]

    assert torch.equal(zigzag_unshard(parts, offsets(layout), dim=dim), x)


@given(layouts, st.booleans())
def test_what_a_rank_takes_from_the_gathered_keys_is_what_it_sees_in_true_order(layout: Layout, causal: bool) -> None:
    gathered = [token for rank in range(layout.world_size) for token in tokens_of(layout, rank)]
    last = dict(tokens_of(layout, layout.rank))  # of each sequence

    taken = [gathered[place] for place in expanded(layout.seen_sources(causal))]

    assert taken == [(s, token) for s, token in true_tokens(layout) if not causal or token <= last.get(s, -1)]
    assert layout.seen_offsets(causal)[-1] == len(taken)


@given(layouts, st.booleans())
def test_a_row_sees_its_sequence_up_to_itself_or_all_of_it(layout: Layout, causal: bool) -> None:
    local = tokens_of(layout, layout.rank)
    gathered = [token for rank in range(layout.world_size) for token in tokens_of(layout, rank)]
    taken = [gathered[place] for place in expanded(layout.seen_sources(causal))]
    seen: dict[int, set[Token]] = {}
    for half in (EARLY, LATE):
        for (first, end), (k_first, k_end) in zip(layout.rows(half), layout.keys(half, causal), strict=True):
            for row in range(first, end):
                stop = k_end - (end - 1 - row) if causal else k_end  # bottom-right
                assert row not in seen
                seen[row] = set(taken[k_first:stop])

    for row, (sequence, token) in enumerate(local):
        every = {(s, other) for s, other in true_tokens(layout) if s == sequence}
        assert seen[row] == {pair for pair in every if pair[1] <= token} if causal else every


@given(layouts)
def test_what_is_prepared_for_a_rank(layout: Layout) -> None:
    local = tokens_of(layout, layout.rank)
    counts = [sum(s == sequence for s, _ in local) for sequence in range(len(layout.chunk_lengths))]

    prepared = zigzag_llama3_prepare(torch.tensor(offsets(layout)), layout.rank, layout.world_size)

    assert prepared.cu_seqlens_q.tolist() == [0, *accumulate(counts)]
    assert prepared.cu_seqlens_k.tolist() == offsets(layout)
    assert prepared.max_seqlen_q == max(counts)
    assert prepared.max_seqlen_k == layout.world_size * max(counts)
    assert prepared.local_k_slice == slice(0, len(true_tokens(layout)))


def test_gradients_pass_through_shards() -> None:
    x = torch.randn(12, 3, requires_grad=True)
    weights = torch.randn(12, 3)

    parts = [zigzag_shard(x, [0, 8, 12], rank, 2) for rank in range(2)]
    (gradient,) = torch.autograd.grad((zigzag_unshard(parts, [0, 8, 12]) * weights).sum(), x)

    assert torch.equal(gradient, weights)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (
            ([0, 8, 13], 0, 2),
            "cu_seqlens[2] - cu_seqlens[1] = 5, but should be a multiple of 2 * world_size = 4, such as",
        ),
        (([0, 3], 0, 2), "= 3, but should be a multiple of 2 * world_size = 4, such as 0 or 4"),
        (([4, 8], 0, 2), "cu_seqlens = [4, 8], but should begin with 0"),
        (([], 0, 2), "cu_seqlens = [], but should begin with 0, and hold the end of every sequence"),
        (([0, 8, 4], 0, 2), "cu_seqlens[2] = 4, but should be at least cu_seqlens[1] = 8"),
        (([0, 8.0], 0, 2), "cu_seqlens[1] = 8.0, but should be an integer"),
        (([0, -4], 0, 2), "cu_seqlens[1] = -4, but should be an integer from 0"),
        (([0, 8], 2, 2), "rank = 2, but should be less than world_size = 2"),
        (([0, 8], -1, 2), "rank = -1, but should be an integer from 0"),
        (([0, 8], 0, 0), "world_size = 0, but should be an integer from 1"),
    ],
)
def test_what_is_no_layout_is_named(told: tuple[Any, int, int], words: str) -> None:
    for refuse in (zigzag_llama3_prepare, lambda *told: zigzag_shard(torch.zeros(8), *told)):
        with pytest.raises(ValueError, match=re.escape(words)):
            refuse(*told)


def test_tokens_of_another_number_are_named() -> None:
    with pytest.raises(ValueError, match=re.escape("x.shape[0] = 7, but should be cu_seqlens[-1] = 8")):
        zigzag_shard(torch.zeros(7), [0, 8], 0, 2)
    with pytest.raises(ValueError, match=re.escape("parts[1].shape[1] = 3, but should be cu_seqlens[-1] / len(parts)")):
        zigzag_unshard([torch.zeros(2, 4), torch.zeros(2, 3)], [0, 8], dim=1)
    with pytest.raises(ValueError, match="parts is empty, but should hold the tokens of every rank"):
        zigzag_unshard([], [0, 8])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(4, 2), "parts[1].shape = torch.Size([4, 2]), but should be torch.Size([4, 3]), as of parts[0]"),
        (torch.zeros(4, 3).half(), "parts[1].dtype = torch.float16, but should be torch.float32, as of parts[0]"),
        (torch.zeros(4, 3, device="meta"), "parts[1].device = meta, but should be cpu, as of parts[0]"),
        (torch.zeros(()), "dim = 0, but should be one of parts[1].shape = ()"),
    ],
)
def test_parts_that_are_not_alike_are_named(other: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        zigzag_unshard([torch.zeros(4, 3), other], [0, 8])

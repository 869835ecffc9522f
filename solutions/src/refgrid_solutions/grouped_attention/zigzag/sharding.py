"""Tokens of all ranks into those of one, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from refgrid_solutions.grouped_attention.arguments import check_alike
from refgrid_solutions.grouped_attention.zigzag.layout import layout_of


class ZigzagPrepared(NamedTuple):
    """What zigzag_llama3_flash_attn_varlen_func is told about the sequences, under its names.

    cu_seqlens_q [sequences + 1] int32: offsets in this rank's tokens; cu_seqlens_k: in those of all ranks. Both are on
    the CPU, where reading them waits for no GPU. max_seqlen_q, max_seqlen_k: the longest of each. local_k_slice: all
    gathered keys.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    local_k_slice: slice


def zigzag_llama3_prepare(cu_seqlens: Any, rank: int, world_size: int) -> ZigzagPrepared:
    """What one rank's calls need, from the offsets [sequences + 1] of whole sequences: call it once a batch.

    cu_seqlens: a sequence of integers or a tensor of them; one on a GPU is copied to the host here, and only here.
    ValueError for offsets that do not begin with 0 or that fall, a sequence whose length is no multiple of
    2 * world_size, and a rank that is none.
    """
    layout = layout_of("cu_seqlens", cu_seqlens, rank, world_size)
    longest = 2 * max(layout.chunk_lengths, default=0)
    local = torch.tensor(layout.local_offsets, dtype=torch.int32)
    total = layout.total_local * world_size
    return ZigzagPrepared(local, local * world_size, longest, longest * world_size, slice(0, total))


def zigzag_shard(x: torch.Tensor, cu_seqlens: Any, rank: int, world_size: int, *, dim: int = 0) -> torch.Tensor:
    """One rank's tokens of x, whose dimension dim holds the tokens of all sequences: cu_seqlens[-1] of them.

    Of every sequence, cut into 2 * world_size equal chunks, chunk number rank and then 2 * world_size - 1 - rank.
    Differentiable. ValueError as in zigzag_llama3_prepare, or if x holds another number of tokens.
    """
    layout = layout_of("cu_seqlens", cu_seqlens, rank, world_size)
    _check_tokens("x", x, dim, layout.total_local * world_size, "cu_seqlens[-1]")
    chunks = [x.narrow(dim, start, end - start) for start, end in layout.true_chunks()]
    return torch.cat(chunks, dim) if chunks else x.narrow(dim, 0, 0).clone()


def zigzag_unshard(parts: Sequence[torch.Tensor], cu_seqlens: Any, *, dim: int = 0) -> torch.Tensor:
    """The tokens of all sequences from those of every rank, in the order of ranks: undoes zigzag_shard.

    parts: a tensor a rank, alike, as torch.distributed.all_gather gives them, or chunk(world_size) of what
    all_gather_into_tensor gives. Differentiable. ValueError as in zigzag_shard, or if they are not alike.
    """
    if not len(parts):
        raise ValueError("parts is empty, but should hold the tokens of every rank")
    layout = layout_of("cu_seqlens", cu_seqlens, 0, len(parts))
    for rank, part in enumerate(parts):
        _check_tokens(f"parts[{rank}]", part, dim, layout.total_local, "cu_seqlens[-1] / len(parts)")
        check_alike(f"parts[{rank}]", part, "parts[0]", parts[0], "shape", "dtype", "device")
    chunks = [parts[rank].narrow(dim, start, length) for rank, start, length in layout.seen_places(causal=False)]
    return torch.cat(chunks, dim) if chunks else parts[0].clone()


def _check_tokens(name: str, x: torch.Tensor, dim: int, should: int, source: str) -> None:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim = {dim}, but should be one of {name}.shape = {tuple(x.shape)}")
    if x.shape[dim] != should:
        raise ValueError(f"{name}.shape[{dim}] = {x.shape[dim]}, but should be {source} = {should}")

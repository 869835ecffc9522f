"""The list form: one entry a group, each with its sequences' rows and the lengths of the keys that they see."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch

from refgrid_solutions.grouped_attention.arguments import (
    check_alike,
    check_flags,
    check_options,
    check_shape,
    scale_of,
)
from refgrid_solutions.grouped_attention.interface import grouped_flash_attn_func, needs_gradients
from refgrid_solutions.grouped_attention.plan import plan_grouped_attn
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL, check_heads, check_size, integer_or_none, listed

Ranges = list[tuple[int, int]]

_planned = torch.compiler.disable(
    plan_grouped_attn, reason="the list form plans in every call: plan_grouped_attn once before this is compiled whole"
)


def grouped_flash_attn_varlen_func(
    q_list: Sequence[torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q_list: Sequence[Sequence[int]],
    cu_seqlens_k_list: Sequence[Sequence[int]],
    *,
    max_seqlen_q_list: Sequence[int] | None = None,
    max_seqlen_k_list: Sequence[int] | None = None,
    causal: bool = False,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    k_offsets: Sequence[int] | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What a varlen call for each group gives, in one: lists of out and lse; differentiable in q_list, k and v.

    q_list: a tensor [rows, num_heads_q, head_dim] a group; k, v [total_k, num_heads_k, head_dim], shared. Offsets of a
    group's sequences, 0 first: in its own rows (cu_seqlens_q_list), and of the keys that they see, of which only the
    lengths count (cu_seqlens_k_list). Where a sequence begins in k is the same for all groups: k_offsets, or, without
    them, what varlen_groups makes of the lengths. causal: bottom-right. max_seqlen_q_list and max_seqlen_k_list are
    not needed; a bound that is given must hold. lse: [num_heads_q, rows] a group, natural logarithm, without gradient.

    This plans anew in every call, and copies offsets that are on a GPU to the host: plan_grouped_attn once instead,
    where the same groups come again or all is to be compiled whole, as torch.compile breaks its graph here. ValueError
    as there; NotImplementedError for dropout, windows, softcap and ALiBi.
    """
    check_options(dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes)
    check_flags(causal=causal, deterministic=deterministic)
    _check_tensors(q_list, k, v)
    scale = scale_of(softmax_scale, k.shape[2])
    offsets = _all_offsets("cu_seqlens_q_list", cu_seqlens_q_list)
    rows, keys = varlen_groups(offsets, cu_seqlens_k_list, k_offsets, total_k=len(k))
    _check_rows(q_list, offsets)
    _check_longest("max_seqlen_q_list", max_seqlen_q_list, rows, len(q_list))
    _check_longest("max_seqlen_k_list", max_seqlen_k_list, keys, len(q_list))
    counts = [len(part) for part in q_list]
    plan = _planned(
        *(rows, keys, [CAUSAL if causal else FULL] * len(rows)),
        total_q=sum(counts),
        total_k=len(k),
        num_heads_q=q_list[0].shape[1],
        num_heads_k=k.shape[1],
        head_dim=k.shape[2],
        dtype=k.dtype,
        device=k.device,
        deterministic=deterministic,
        backend=backend,
        backward=needs_gradients(*q_list, k, v),
    )
    q = torch.cat(list(q_list)) if len(q_list) > 1 else q_list[0]
    out, lse = grouped_flash_attn_func(q, k, v, plan, softmax_scale=scale, backend=backend)
    return list(out.split(counts)), list(lse.split(counts, dim=1))


def varlen_groups(
    cu_seqlens_q_list: Sequence[Sequence[int]],
    cu_seqlens_k_list: Sequence[Sequence[int]],
    k_offsets: Sequence[int] | None = None,
    *,
    total_k: int | None = None,
) -> tuple[Ranges, Ranges]:
    """Rows and keys of every sequence of every group, as the ranges of a plan over the groups' rows back to back.

    k_offsets: where each sequence begins in the shared keys. Without them sequences lie back to back there, each as
    long as the longest that a group sees of it; of several sequences that is known only if they fill total_k.
    ValueError for offsets that do not begin at 0 or that fall, groups of different numbers of sequences, and lengths
    that leave open where a sequence begins.
    """
    rows = _all_offsets("cu_seqlens_q_list", cu_seqlens_q_list)
    keys = _all_offsets("cu_seqlens_k_list", cu_seqlens_k_list)
    _check_numbers(rows, keys)
    lengths = [[end - start for start, end in pairwise(offsets)] for offsets in keys]
    starts = _starts(lengths, total_k) if k_offsets is None else _told(k_offsets, len(rows[0]) - 1 if rows else 0)
    first = [0, *accumulate(offsets[-1] for offsets in rows)]
    q_ranges = [(base + a, base + b) for base, offsets in zip(first, rows, strict=False) for a, b in pairwise(offsets)]
    k_ranges = [(start, start + length) for group in lengths for start, length in zip(starts, group, strict=True)]
    return q_ranges, k_ranges


def _check_tensors(q_list: Any, k: torch.Tensor, v: torch.Tensor) -> None:
    if isinstance(q_list, torch.Tensor) or not isinstance(q_list, Sequence):
        found = type(q_list).__name__
        raise ValueError(f"q_list is a {found}, but should be a list of tensors, one a group")  # noqa: TRY004 - as of all
    if not q_list:
        raise ValueError("q_list is empty, but should hold a tensor for each group")
    first = q_list[0]
    check_shape("q_list[0]", first, (None, None, None), "")
    for group, q in enumerate(q_list):
        check_shape(f"q_list[{group}]", q, (None, *first.shape[1:]), ", as q_list[0] has them")
    check_shape("k", k, (None, None, first.shape[2]), ", as q_list[0] has it")
    check_shape("v", v, tuple(k.shape), ", as of k")
    check_heads(first.shape[1], k.shape[1], k.shape[2])
    for name, tensor in (*((f"q_list[{group}]", q) for group, q in enumerate(q_list)), ("k", k), ("v", v)):
        check_alike(name, tensor, "q_list[0]", first)


def _all_offsets(name: str, told: Any) -> list[list[int]]:
    return [_offsets(name, group, offsets) for group, offsets in enumerate(listed(name, told))]


def _offsets(name: str, group: int, told: Any) -> list[int]:
    offsets = _integers(f"{name}[{group}]", told)
    if not offsets or offsets[0] != 0 or any(one > other for one, other in pairwise(offsets)):
        raise ValueError(f"{name}[{group}] = {offsets}, but should begin with 0 and never fall")
    return offsets


def _integers(name: str, told: Any) -> list[int]:
    values = listed(name, told)
    numbers = [number for number in map(integer_or_none, values) if number is not None]
    if len(numbers) != len(values):
        raise ValueError(f"{name} = {values}, but should be integers")
    return numbers


def _check_numbers(rows: Sequence[list[int]], keys: Sequence[list[int]]) -> None:
    if len(rows) != len(keys):
        raise ValueError(
            f"cu_seqlens_q_list has {len(rows)} groups and cu_seqlens_k_list {len(keys)}, but should be equal"
        )
    for name, lists in (("cu_seqlens_q_list", rows), ("cu_seqlens_k_list", keys)):
        for group, offsets in enumerate(lists):
            if len(offsets) != len(rows[0]):
                raise ValueError(
                    f"{name}[{group}] tells of {len(offsets) - 1} sequences, but should of {len(rows[0]) - 1}, as "
                    "cu_seqlens_q_list[0] does"
                )


def _starts(lengths: Sequence[Sequence[int]], total_k: int | None) -> list[int]:
    longest = [max(sequence) for sequence in zip(*lengths, strict=True)]
    if len(longest) > 1 and sum(longest) != total_k:
        raise ValueError(
            f"k_offsets = None: the longest that groups see of the {len(longest)} sequences are {longest} keys, "
            f"{sum(longest)} together, but total_k = {total_k}: k_offsets should say where each sequence begins in k"
        )
    return [0, *accumulate(longest[:-1])] if longest else []


def _told(k_offsets: Any, count: int) -> list[int]:
    starts = _integers("k_offsets", k_offsets)
    if len(starts) != count:
        raise ValueError(f"k_offsets = {starts} has {len(starts)} entries, but should have one a sequence: {count}")
    return starts


def _check_rows(q_list: Sequence[torch.Tensor], cu_seqlens_q_list: Sequence[Sequence[int]]) -> None:
    if len(q_list) != len(cu_seqlens_q_list):
        raise ValueError(f"q_list has {len(q_list)} groups, but cu_seqlens_q_list has {len(cu_seqlens_q_list)}")
    for group, (q, offsets) in enumerate(zip(q_list, cu_seqlens_q_list, strict=True)):
        if len(q) != offsets[-1]:
            raise ValueError(f"q_list[{group}] has {len(q)} rows, but cu_seqlens_q_list[{group}] ends at {offsets[-1]}")


def _check_longest(name: str, bounds: Sequence[int] | None, ranges: Ranges, groups: int) -> None:
    if bounds is None:
        return
    bounds = listed(name, bounds)
    if len(bounds) != groups:
        raise ValueError(f"{name} has {len(bounds)} entries, but should have one a group: {groups}")
    each = len(ranges) // groups
    for group, bound in enumerate(bounds):
        check_size(f"{name}[{group}]", bound, smallest=0)
        longest = max((end - start for start, end in ranges[group * each : (group + 1) * each]), default=0)
        if bound < longest:
            raise ValueError(f"{name}[{group}] = {bound}, but should be at least {longest}, the longest sequence")

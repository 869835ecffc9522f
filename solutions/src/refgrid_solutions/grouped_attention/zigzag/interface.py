"""What callers use: attention of one rank's rows over the keys of all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from refgrid_solutions.grouped_attention.arguments import (
    check_alike,
    check_flags,
    check_options,
    check_shape,
    scale_of,
)
from refgrid_solutions.grouped_attention.interface import needs_gradients
from refgrid_solutions.grouped_attention.ranges import check_heads, check_size
from refgrid_solutions.grouped_attention.zigzag.exchange import Exchange, exchange_of
from refgrid_solutions.grouped_attention.zigzag.layout import Layout, check_local, check_longest, layout_of
from refgrid_solutions.grouped_attention.zigzag.pipeline import Run, ZigzagAttention
from refgrid_solutions.grouped_attention.zigzag.planned import Setting, zigzag_plan


# Collectives under way and a plan that is looked up are no graph: all of it is left to Python.
@torch.compiler.disable(  # type: ignore[untyped-decorator]  # torch gives it no types
    reason="zigzag attention is not compiled: it may be called between compiled graphs"
)
def zigzag_llama3_flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int,
    max_seqlen_k: int,
    heads_k_stride: int,
    local_k_slice: slice | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | Exchange | None = None,
    n_chunks: int = 2,
    use_grouped_attention: bool = True,
    backend: str = "auto",
) -> Any:
    """Exact attention of this rank's rows over the keys of all ranks of the group; differentiable in q, k and v.

    q [rows, num_heads_q, head_dim], k and v [rows, num_heads_k, head_dim]: this rank's tokens, as zigzag_shard cuts
    them. Every rank of the group calls this with its own tokens and the same other arguments, cu_seqlens_q included.
    cu_seqlens_q, cu_seqlens_k [sequences + 1]: offsets in this rank's tokens and in those of all ranks; max_seqlen_q,
    max_seqlen_k: bounds on their lengths. All as zigzag_llama3_prepare gives them. -> out as q. With
    return_attn_probs, as at the origin, (out, lse, None): lse [num_heads_q, rows] float32 (float64 for float64),
    natural logarithm, without a gradient; the probabilities themselves are never made.

    heads_k_stride: heads of k that are gathered and attended to at a time, a divisor of their number. While they
    compute, the next are gathered; on a GPU, with fewer than all, communication hides behind computation. Memory: keys
    and values of so many heads of all ranks, twice, and backward their gradients in float32.

    The plan is made in the first call with the same sequences, heads, dtype, device and backend (64 are kept), which
    waits until it is on the device, so that calls on any stream may use it; do that before a CUDA graph is captured. No
    other call waits for the GPU, provided that cu_seqlens_q and cu_seqlens_k are tensors on the CPU, as
    zigzag_llama3_prepare makes them, or sequences of integers: tensors on a GPU are read by every call, which waits for
    it.

    torch.compile breaks its graph here, and fullgraph=True is refused.

    causal: each token sees its sequence up to itself; otherwise all of it. deterministic: gradients of the same bits
    every time. group: a process group, or an Exchange; None is the default group. use_grouped_attention: one call of
    the backend a step for both chunks of all sequences; if False, one for all early chunks and one for all late ones.
    backend: as in grouped_flash_attn_func. local_k_slice is taken for the origin's sake and not used. Gradients of k
    and v are summed over ranks in float32.

    ValueError names what does not fit, before anything is sent or launched: sequences that are no multiple of
    2 * world_size, offsets that do not match each other or the tensors, heads, dtypes, devices, a scale that is not
    finite, flags that are not True or False. NotImplementedError names the argument: dropout, windows, ALiBi, n_chunks
    other than 2.
    """
    del local_k_slice
    check_options(dropout_p=dropout_p, window_size=window_size, alibi_slopes=alibi_slopes)
    if n_chunks != 2:
        raise NotImplementedError(f"n_chunks = {n_chunks}: zigzag attention is written for 2 only")
    check_flags(causal=causal, deterministic=deterministic, return_attn_probs=return_attn_probs)
    check_flags(use_grouped_attention=use_grouped_attention)
    exchange = exchange_of(group)
    layout = layout_of("cu_seqlens_k", cu_seqlens_k, exchange.rank, exchange.world_size)
    check_local(cu_seqlens_q, layout)
    _check_bounds(max_seqlen_q, max_seqlen_k, layout)
    _check_tensors(q, k, v, layout)
    _check_stride(heads_k_stride, k.shape[1])
    share, head_dim = q.shape[1] // k.shape[1], q.shape[2]
    scale = scale_of(softmax_scale, head_dim)
    sizes = (share * heads_k_stride, heads_k_stride, head_dim, q.dtype, q.device)
    ways = (causal, use_grouped_attention, deterministic, backend)
    plan = zigzag_plan(layout, Setting(*sizes, *ways))
    backward = needs_gradients(q, k, v)
    names = tuple(call.plan.prepare(backend, backward=backward) for call in plan.calls)
    out, lse = ZigzagAttention.apply(q, k, v, Run(exchange, plan, names, heads_k_stride, scale))
    return (out, lse, None) if return_attn_probs else out


def zigzag_llama3_flash_attn_varlen_kvpacked_func(
    q: torch.Tensor, kv: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, *others: Any, **named: Any
) -> Any:
    """The same with k and v in one tensor kv [rows, 2, num_heads_k, head_dim], which gets one gradient."""
    _check_packed("kv", kv, 2)
    k, v = kv.unbind(1)
    return zigzag_llama3_flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *others, **named)


def zigzag_llama3_flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any, *others: Any, **named: Any
) -> Any:
    """The same with q, k and v, of as many heads each, in one tensor qkv [rows, 3, num_heads, head_dim]."""
    _check_packed("qkv", qkv, 3)
    q, k, v = qkv.unbind(1)
    return zigzag_llama3_flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, *others, **named)


def _check_bounds(max_seqlen_q: int, max_seqlen_k: int, layout: Layout) -> None:
    local = layout.local_offsets
    check_longest("max_seqlen_q", max_seqlen_q, local)
    check_longest("max_seqlen_k", max_seqlen_k, [offset * layout.world_size for offset in local])


def _check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> None:
    rows = ": cu_seqlens_q[-1] rows"
    check_shape("q", q, (layout.total_local, None, None), rows)
    check_shape("k", k, (layout.total_local, None, q.shape[2]), rows)
    check_shape("v", v, tuple(k.shape), rows)
    check_heads(q.shape[1], k.shape[1], q.shape[2])
    check_alike("k", k, "q", q)
    check_alike("v", v, "q", q)


def _check_stride(heads_k_stride: int, num_heads_k: int) -> None:
    check_size("heads_k_stride", heads_k_stride, smallest=1)
    if num_heads_k % heads_k_stride:
        legal = ", ".join(str(heads) for heads in range(1, num_heads_k + 1) if num_heads_k % heads == 0)
        raise ValueError(
            f"heads_k_stride = {heads_k_stride}, but should divide the {num_heads_k} heads of k: one of {legal}"
        )


def _check_packed(name: str, packed: torch.Tensor, count: int) -> None:
    if packed.dim() != 4 or packed.shape[1] != count:
        raise ValueError(f"{name}.shape = {tuple(packed.shape)}, but should be (rows, {count}, heads, head_dim)")

"""Doubles of the functions of FlashInfer 0.6.12 and SGLang 0.5.15 for the gated delta rule: they take what those take.

They answer in float32, update in place what the kernels update in place, and assert what the libraries demand.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

called: dict[str, Any] = {}  # what the latest call of a function got


def walk(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, g: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One sequence: q, k [T, heads, d]; v [T, v heads, d]; state [v heads, d_v, d_k]; g, beta [T, v heads].

    -> output [T, v heads, d_v] as v, the state after each token [T, v heads, d_v, d_k].
    """
    group, outputs, states = v.shape[1] // q.shape[1], [], []
    for t in range(len(q)):
        key, query = (x[t].float().repeat_interleave(group, 0) for x in (k, q))
        state = state * g[t, :, None, None]
        delta = beta[t, :, None] * (v[t].float() - (state * key[:, None]).sum(2))
        state = state + delta[:, :, None] * key[:, None]
        outputs.append(scale * (state * query[:, None]).sum(2))
        states.append(state)
    return torch.stack(outputs).to(v.dtype), torch.stack(states)


def gates(A_log: Tensor, a: Tensor, dt_bias: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
    assert A_log.dtype == torch.float32, "A_log must be float32"
    x = a.float() + dt_bias.float()
    softplus = torch.where(x <= 20.0, torch.log(1 + torch.exp(x)), x)
    return torch.exp(-A_log.exp() * softplus), 1 / (1 + torch.exp(-b.float()))


def no_l2norm(asked: bool) -> None:
    assert not asked, "the definition's keys and queries are used as given"


# ---- FlashInfer


def gated_delta_rule_decode_pretranspose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,  # noqa: N803
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    output_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    called.update(locals())
    no_l2norm(use_qk_l2norm)
    assert output is initial_state is initial_state_indices is output_state_indices is None
    assert state.is_contiguous()
    assert (q.shape[1], q.dtype, state.dtype) == (1, torch.bfloat16, torch.float32)
    assert q.shape[3] >= 128 <= v.shape[3]
    g, beta = gates(A_log, a, dt_bias, b)
    scale, rows = q.shape[3] ** -0.5 if scale is None else scale, []
    for row in range(len(q)):
        out, states = walk(q[row], k[row], v[row], state[row], g[row], beta[row], scale)
        rows.append(out)
        state[row] = states[-1]
    return torch.stack(rows), state


def gated_delta_rule_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,  # noqa: N803
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float | None = None,
    output: Tensor | None = None,
    intermediate_states_buffer: Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
) -> tuple[Tensor, Tensor]:
    """The buffer is indexed by the place in the batch; what has a negative index is skipped."""
    called.update(locals())
    no_l2norm(use_qk_l2norm)
    assert output is None
    assert disable_state_update is False
    assert initial_state_indices.dtype == torch.int32
    assert initial_state.is_contiguous()
    buffer = intermediate_states_buffer
    assert buffer is not None
    assert buffer.is_contiguous()
    assert buffer.shape[0] >= len(q)
    g, beta = gates(A_log, a, dt_bias, b)
    scale, result = q.shape[3] ** -0.5 if scale is None else scale, torch.zeros(v.shape, dtype=torch.bfloat16)
    for row, slot in enumerate(initial_state_indices.tolist()):
        if slot >= 0:
            result[row], states = walk(q[row], k[row], v[row], initial_state[slot], g[row], beta[row], scale)
            buffer[row, : q.shape[1]] = states
            initial_state[slot] = states[-1]
    return result, initial_state


def flashinfer_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor]:
    """g is the gate itself; a sequence without tokens would never end."""
    called.update(locals())
    no_l2norm(use_qk_l2norm_in_kernel)
    assert output_final_state
    assert g is not None
    assert beta is not None
    assert cu_seqlens is not None
    assert initial_state is not None
    assert (g.dtype, beta.dtype, initial_state.dtype) == (torch.float32,) * 3
    assert cu_seqlens.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, k, v, g, beta, initial_state, cu_seqlens))
    assert len(initial_state) == len(cu_seqlens) - 1
    assert (cu_seqlens.diff() > 0).all(), "the kernel hangs"
    scale = scale if scale is not None and scale != 0.0 else 1.0 / math.sqrt(q.shape[2])
    outputs, finals = [], []
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        now = slice(start, end)
        out, states = walk(q[now], k[now], v[now], initial_state[row], g[now], beta[now], scale)
        outputs.append(out)
        finals.append(states[-1])
    return torch.cat(outputs), torch.stack(finals)


# ---- SGLang


def fused_sigmoid_gating_delta_rule_update(
    A_log: Tensor,  # noqa: N803
    a: Tensor,
    dt_bias: Tensor,
    softplus_beta: float,
    softplus_threshold: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    is_kda: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Tensor | None = None,
) -> Tensor:
    called.update(locals())
    no_l2norm(use_qk_l2norm_in_kernel)
    assert (softplus_beta, softplus_threshold, is_kda, disable_state_update) == (1.0, 20.0, False, False)
    assert cu_seqlens is retrieve_parent_token is None
    assert scale is None or scale > 0, "scale must be positive"
    g, beta = gates(A_log, a, dt_bias, b)
    scale, rows = k.shape[3] ** -0.5 if scale is None else scale, []
    for row, slot in enumerate(initial_state_indices.tolist()):
        out, states = walk(q[row], k[row], v[row], initial_state_source[slot], g[row], beta[row], scale)
        rows.append(out)
        initial_state_source[slot] = states[-1]
        if intermediate_states_buffer is not None:
            assert intermediate_state_indices is not None
            assert cache_steps == intermediate_states_buffer.shape[1]
            intermediate_states_buffer[intermediate_state_indices[row], : len(states)] = states
    return torch.stack(rows)


def sglang_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    initial_state_indices: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, None, Tensor]:
    """g is the logarithm of the gate; states are updated in the pool."""
    called.update(locals())
    no_l2norm(use_qk_l2norm_in_kernel)
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16, "does not support float32"
    assert len(q) == len(g) == 1
    assert not head_first
    assert cu_seqlens is not None
    assert initial_state is not None
    assert initial_state_indices is not None
    assert len(initial_state_indices) == len(cu_seqlens) - 1
    assert (cu_seqlens.diff() > 0).all(), "chunks would be taken for those of the next sequence"
    assert initial_state.is_contiguous()
    scale, outputs = k.shape[-1] ** -0.5 if scale is None else scale, []
    ends = pairwise(cu_seqlens.tolist())
    for slot, (start, end) in zip(initial_state_indices.tolist(), ends, strict=True):
        queries, keys, values, log_g, rate = (x[0, start:end] for x in (q, k, v, g, beta))
        out, states = walk(queries, keys, values, initial_state[slot], log_g.exp(), rate, scale)
        outputs.append(out)
        initial_state[slot] = states[-1]
    return torch.cat(outputs)[None], None, initial_state

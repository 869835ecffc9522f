"""Each op as a loop over sequences, tokens and heads, in float32: what references are timed against.

This is how published data sets write their references, right, plain and slow: one head of one token at a time, a cache
widened before it is indexed, one filter after the other. Same inputs, same outputs.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of one query, and the base-2 lse of its scores."""
    return scores.softmax(-1), scores.logsumexp(-1) / math.log(2)


def rmsnorm(hidden_states: Tensor, weight: Tensor) -> Tensor:
    """Token by token."""
    rows = [x.float() * torch.rsqrt(x.float().square().mean() + 1e-6) * weight.float() for x in hidden_states]
    return torch.stack(rows).to(hidden_states.dtype)


def gemm(a: Tensor, b: Tensor) -> Tensor:
    """Token by token."""
    wide = b.float()
    return torch.stack([wide @ row.float() for row in a]).to(a.dtype)


def _one_query(q: Tensor, k: Tensor, v: Tensor, sm_scale: float) -> tuple[Tensor, Tensor]:
    """q [heads, d]; k, v [keys, kv heads, d], head by head -> output [heads, d_vo], lse [heads]."""
    group, outputs, sums = len(q) // k.shape[1], [], []
    for head in range(len(q)):
        weights, lse = _softmax(k[:, head // group] @ q[head] * sm_scale)
        outputs.append(weights @ v[:, head // group])
        sums.append(lse)
    return torch.stack(outputs), torch.stack(sums)


def _causal(
    q: Tensor, k: list[Tensor], v: list[Tensor], qo_indptr: Tensor, sm_scale: float, d_vo: int
) -> tuple[Tensor, Tensor]:
    """Every query of every sequence by itself; k, v hold one tensor a sequence."""
    output, lse = q.new_zeros(*q.shape[:2], d_vo), torch.full(q.shape[:2], -math.inf)
    for sequence, (begin, end) in enumerate(pairwise(qo_indptr.tolist())):
        for i in range(begin, end):
            seen = len(k[sequence]) - (end - 1 - i)
            if seen > 0:
                keys, values = k[sequence][:seen], v[sequence][:seen]
                output[i], lse[i] = _one_query(q[i].float(), keys, values, sm_scale)
    return output, lse


def _pages(cache: Tensor, kv_indptr: Tensor, kv_indices: Tensor) -> list[Tensor]:
    """The keys of each sequence in float32; pages of one token."""
    wide = cache[:, 0].float()
    return [wide[kv_indices[begin:end].long()] for begin, end in pairwise(kv_indptr.tolist())]


def gqa_paged_decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_indptr: Tensor, kv_indices: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(q) + 1)
    return gqa_paged_prefill_causal(q, k_cache, v_cache, rows, kv_indptr, kv_indices, sm_scale)


def gqa_paged_prefill_causal(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    k, v = (_pages(cache, kv_indptr, kv_indices) for cache in (k_cache, v_cache))
    return _causal(q, k, v, qo_indptr, sm_scale, v_cache.shape[-1])


def ragged_prefill_causal(
    q: Tensor, k: Tensor, v: Tensor, qo_indptr: Tensor, kv_indptr: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """gqa_ragged_prefill_causal and mla_ragged_prefill_causal."""
    parts = list(pairwise(kv_indptr.tolist()))
    keys, values = ([x[begin:end].float() for begin, end in parts] for x in (k, v))
    return _causal(q, keys, values, qo_indptr, sm_scale, v.shape[-1])


def mla_paged_prefill_causal(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    v = [part[:, None] for part in _pages(ckv_cache, kv_indptr, kv_indices)]
    pe = [part[:, None] for part in _pages(kpe_cache, kv_indptr, kv_indices)]
    k = [torch.cat(parts, -1) for parts in zip(v, pe, strict=True)]
    return _causal(torch.cat([q_nope, q_pe], -1), k, v, qo_indptr, sm_scale, v[0].shape[-1])


def mla_paged_decode(
    q_nope: Tensor,
    q_pe: Tensor,
    ckv_cache: Tensor,
    kpe_cache: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    sm_scale: float,
) -> tuple[Tensor, Tensor]:
    rows = torch.arange(len(q_nope) + 1)
    return mla_paged_prefill_causal(q_nope, q_pe, ckv_cache, kpe_cache, rows, kv_indptr, kv_indices, sm_scale)


def dsa_sparse_attention(
    q_nope: Tensor, q_pe: Tensor, ckv_cache: Tensor, kpe_cache: Tensor, sparse_indices: Tensor, sm_scale: float
) -> tuple[Tensor, Tensor]:
    output, lse = torch.zeros_like(q_nope), torch.full(q_nope.shape[:2], -math.inf)
    ckv, kpe = ckv_cache.flatten(0, 1).float(), kpe_cache.flatten(0, 1).float()
    for token, indices in enumerate(sparse_indices):
        slots = indices[indices >= 0].long()
        if len(slots):
            q, k = torch.cat([q_nope[token], q_pe[token]], -1).float(), torch.cat([ckv[slots], kpe[slots]], -1)
            output[token], lse[token] = _one_query(q, k[:, None], ckv[slots, None], sm_scale)
    return output, lse


def dsa_topk_indexer_fp8(
    q_index_fp8: Tensor, k_index_cache_fp8: Tensor, weights: Tensor, seq_lens: Tensor, block_table: Tensor
) -> Tensor:
    """Page by page and head by head, and a full sort."""
    found = torch.full((len(seq_lens), 2048), -1, dtype=torch.int32)
    for row, length in enumerate(seq_lens.tolist()):
        scores: list[Tensor] = []
        slots: list[int] = []
        for number, page in enumerate(block_table[row, : -(-length // 64)].tolist()):
            raw = k_index_cache_fp8[page].view(torch.uint8).flatten()
            keys = raw[: 64 * 128].view(torch.float8_e4m3fn).view(64, 128).float()
            keys = keys * raw[64 * 128 :].view(torch.float32)[:, None]
            total, q = torch.zeros(64), q_index_fp8[row].float()
            for head in range(len(q)):
                total += weights[row, head] * (keys @ q[head]).relu()
            scores.append(total[: length - 64 * number])
            slots += range(64 * page, 64 * page + min(64, length - 64 * number))
        if slots:
            order = torch.cat(scores).sort(descending=True).indices[:2048]
            found[row, : len(order)] = torch.tensor(slots, dtype=torch.int32)[order]
    return found


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor, beta: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One token, head by head: the old value out, the new in; state [heads, V, K] -> output [heads, V], next state."""
    group, outputs, states = len(v) // len(q), [], []
    for head in range(len(v)):
        key, s = k[head // group], state[head] * decay[head]
        old = s @ key
        new = beta[head] * v[head] + (1 - beta[head]) * old
        s = s - torch.outer(old, key) + torch.outer(new, key)
        outputs.append(scale * (s @ q[head // group]))
        states.append(s)
    return torch.stack(outputs), torch.stack(states)


def gdn_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,  # noqa: N803 - the definition's names
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence."""
    output, new_state = torch.empty_like(v), torch.empty_like(state)
    scale = scale or q.shape[-1] ** -0.5
    for row in range(len(q)):
        new_state[row] = state[row]
        for t in range(q.shape[1]):
            decay = torch.exp(-A_log.exp() * torch.nn.functional.softplus(a[row, t].float() + dt_bias))
            token = q[row, t].float(), k[row, t].float(), v[row, t].float()
            beta = b[row, t].float().sigmoid()
            output[row, t], new_state[row] = _delta_rule(*token, new_state[row], decay, beta, scale)
    return output, new_state


def gdn_mtp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    A_log: Tensor,  # noqa: N803
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    scale: float,
    intermediate_states_buffer: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence by sequence, token by token."""
    output, final_state, between = torch.zeros_like(v), initial_state.clone(), intermediate_states_buffer.clone()
    for row, slot in enumerate(initial_state_indices.tolist()):
        for t in range(q.shape[1] if slot >= 0 else 0):
            one = slice(row, row + 1), slice(t, t + 1)
            gates = A_log, a[one], dt_bias, b[one]
            output[one], state = gdn_decode(q[one], k[one], v[one], final_state[slot : slot + 1], *gates, scale)
            final_state[slot] = between[row, t] = state[0]
    return output, final_state, between


def gdn_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    A_log: Tensor,  # noqa: N803
    a: Tensor,
    dt_bias: Tensor,
    b: Tensor,
    cu_seqlens: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Token by token."""
    outputs, states = [v[:0]], []
    for row, (begin, end) in enumerate(pairwise(cu_seqlens.tolist())):
        part = slice(begin, end)
        gates = a[None, part], dt_bias, b[None, part]
        tokens = q[None, part], k[None, part], v[None, part]
        output, new_state = gdn_decode(*tokens, state[row : row + 1], A_log, *gates, scale)
        outputs.append(output[0])
        states.append(new_state)
    return torch.cat(outputs), torch.cat(states)


def mamba_ssu_decode(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor,  # noqa: N803
    dt_bias: Tensor,
    state_batch_indices: Tensor,
) -> tuple[Tensor, Tensor]:
    """Sequence by sequence and head by head."""
    output, new_state, group = torch.zeros_like(x), state.clone(), x.shape[1] // B.shape[1]
    for row, slot in enumerate(state_batch_indices.tolist()):
        for head in range(x.shape[1] if slot >= 0 else 0):
            step = torch.nn.functional.softplus(dt[row, head].float() + dt_bias[head].float())[:, None]
            inflow = step * x[row, head].float()[:, None] * B[row, head // group].float()
            s = state[slot, head].float() * torch.exp(step * A[head]) + inflow
            y = s @ C[row, head // group].float() + D[head].float() * x[row, head].float()
            output[row, head], new_state[slot, head] = y, s
    return output, new_state


def rope_with_cos_sin_cache_neox_style(
    q: Tensor, k: Tensor, cos_sin_cache: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """Token by token and head by head."""
    half = cos_sin_cache.shape[1] // 2
    outputs = []
    for x in (q, k):
        out = x.clone()
        for token, position in enumerate(positions.tolist()):
            cos, sin = cos_sin_cache[position, :half], cos_sin_cache[position, half:]
            for head in range(x.shape[1]):
                one, two = x[token, head, :half].float(), x[token, head, half : 2 * half].float()
                out[token, head, : 2 * half] = torch.cat([one * cos - two * sin, two * cos + one * sin])
        outputs.append(out)
    return outputs[0], outputs[1]


def top_k_top_p_sampling_from_probs(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Row by row, sorted in full for each of the two filters."""
    samples = []
    for row, k, p in zip(probs, top_k.tolist(), top_p.tolist(), strict=True):
        values, tokens = row.sort(descending=True)
        values = values[: k if 0 < k < len(row) else len(row)]
        kept = torch.zeros_like(row).index_copy(0, tokens[: len(values)], values / values.sum())
        values, tokens = kept.sort(descending=True)
        before = values.cumsum(0) - values
        values = values * (before < p) if p > 0 else values * (torch.arange(len(values)) == 0)
        kept = torch.zeros_like(row).index_copy(0, tokens, values)
        samples.append(torch.multinomial(kept, 1))
    return torch.cat(samples)


def moe_fp8_block_scale_renorm(
    routing_logits: Tensor,
    hidden_states: Tensor,
    hidden_states_scale: Tensor,
    gemm1_weights: Tensor,
    gemm1_weights_scale: Tensor,
    gemm2_weights: Tensor,
    gemm2_weights_scale: Tensor,
    *,
    top_k: int,
) -> Tensor:
    """Token by token and expert by expert."""
    rows = []
    for token, logits in enumerate(routing_logits.float()):
        x = hidden_states[token].float() * hidden_states_scale[:, token].repeat_interleave(128)
        best, experts = logits.topk(top_k)
        total = torch.zeros(len(x))
        for weight, expert in zip(best.softmax(0), experts.tolist(), strict=True):
            w1, w2 = (
                w[expert].float() * s[expert].repeat_interleave(128, 0).repeat_interleave(128, 1)
                for w, s in ((gemm1_weights, gemm1_weights_scale), (gemm2_weights, gemm2_weights_scale))
            )
            up, gate = (w1 @ x).chunk(2)
            total += weight * (w2 @ (up * torch.nn.functional.silu(gate)))
        rows.append(total)
    return torch.stack(rows).bfloat16()

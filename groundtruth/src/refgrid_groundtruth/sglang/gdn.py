"""The gated delta rule by SGLang's Triton kernels; read in 0.5.15, whose states are [.., d_v, d_k]."""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.fla.chunk import chunk_gated_delta_rule
from sglang.srt.layers.attention.fla.fused_sigmoid_gating_recurrent import fused_sigmoid_gating_delta_rule_update

from refgrid_groundtruth.delta import demand_no_padding, gates, with_tokens


def gdn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,  # noqa: N803 - the definition's name
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> dict[str, torch.Tensor]:
    """fused_sigmoid_gating_delta_rule_update on a pool of as many slots as sequences.

    q, k [batch_size, 1, num_q_heads, d]; v [batch_size, 1, num_v_heads, d]; state [batch_size, num_v_heads, d, d];
    A_log, dt_bias [num_v_heads]; a, b [batch_size, 1, num_v_heads] -> output as v, new_state as state.
    """
    pool, rows = state.clone(), torch.arange(len(q), dtype=torch.int32, device=q.device)
    output = fused_sigmoid_gating_delta_rule_update(
        A_log=A_log,
        a=a,
        dt_bias=dt_bias,
        softplus_beta=1.0,
        softplus_threshold=20.0,
        q=q,
        k=k,
        v=v,
        b=b,
        initial_state_source=pool,
        initial_state_indices=rows,
        scale=scale or None,
        use_qk_l2norm_in_kernel=False,
    )
    return {"output": output, "new_state": pool}


def gdn_mtp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    A_log: torch.Tensor,  # noqa: N803 - the definition's name
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    intermediate_states_buffer: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """fused_sigmoid_gating_delta_rule_update, which keeps the state after each token where it is told to: in row i.

    q, k [batch_size, seq_len, num_q_heads, d]; v [batch_size, seq_len, num_v_heads, d]; initial_state [pool_size,
    num_v_heads, d, d]; initial_state_indices [batch_size]; a, b [batch_size, seq_len, num_v_heads];
    intermediate_states_buffer [pool_size, seq_len, num_v_heads, d, d] -> output as v, final_state as initial_state,
    intermediate_states as intermediate_states_buffer. Raises Unavailable("unsupported") for padding, which the kernel
    takes for a state of zeros.
    """
    demand_no_padding(initial_state_indices)
    pool, buffer = initial_state.clone(), intermediate_states_buffer.clone()
    output = fused_sigmoid_gating_delta_rule_update(
        A_log=A_log,
        a=a,
        dt_bias=dt_bias,
        softplus_beta=1.0,
        softplus_threshold=20.0,
        q=q,
        k=k,
        v=v,
        b=b,
        initial_state_source=pool,
        initial_state_indices=initial_state_indices,
        scale=scale or None,
        use_qk_l2norm_in_kernel=False,
        disable_state_update=False,
        intermediate_states_buffer=buffer,
        intermediate_state_indices=torch.arange(len(q), dtype=torch.int32, device=q.device),
        cache_steps=q.shape[1],
    )
    return {"output": output, "final_state": pool, "intermediate_states": buffer}


def gdn_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,  # noqa: N803 - the definition's name
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> dict[str, torch.Tensor]:
    """chunk_gated_delta_rule on a pool of states, which it updates in place.

    q, k [total_seq_len, num_q_heads, d]; v [total_seq_len, num_v_heads, d]; state [num_seqs, num_v_heads, d, d]; a, b
    [total_seq_len, num_v_heads]; cu_seqlens [num_seqs + 1] int64 -> output as v, new_state as state. The kernel numbers
    the sequences by their first chunks, so those without tokens are left out of the call, and their slots stay.
    """
    log_g, beta = gates(A_log, a, dt_bias, b)
    rows, starts = with_tokens(cu_seqlens)
    pool = state.clone()
    output, *_ = chunk_gated_delta_rule(
        *(each[None] for each in (q, k, v, log_g, beta)),
        scale=scale or None,
        initial_state=pool,
        initial_state_indices=rows.int(),
        cu_seqlens=starts,
        use_qk_l2norm_in_kernel=False,
    )
    return {"output": output[0], "new_state": pool}

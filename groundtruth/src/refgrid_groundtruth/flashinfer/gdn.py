"""The gated delta rule by FlashInfer: CuTe kernels for decode and drafts, a chunked Hopper kernel for prefill.

Read in 0.6.7.post3, 0.6.12 and 0.7.2.post1. Decode and drafts need the CUTLASS DSL, without which the library offers
functions that cannot run.
"""

from __future__ import annotations

import importlib.util

import flashinfer.gdn_decode
import flashinfer.gdn_prefill
import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.delta import gates, with_tokens


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
    """flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose, whose state is [.., d_v, d_k].

    q, k [batch_size, 1, num_q_heads, 128]; v [batch_size, 1, num_v_heads, 128]; state [batch_size, num_v_heads, 128,
    128]; A_log, dt_bias [num_v_heads]; a, b [batch_size, 1, num_v_heads] -> output as v, new_state as state.
    """
    _demand_dsl()
    output, new_state = flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose(
        q, k, v, state.clone(), A_log, a, dt_bias, b, scale=scale or None, use_qk_l2norm=False
    )
    return {"output": output, "new_state": new_state}


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
    """flashinfer.gdn_decode.gated_delta_rule_mtp; it skips padding, and writes into the pool and into the buffer.

    q, k [batch_size, seq_len, num_q_heads, 128]; v [batch_size, seq_len, num_v_heads, 128]; initial_state [pool_size,
    num_v_heads, 128, 128]; initial_state_indices [batch_size] int32; a, b [batch_size, seq_len, num_v_heads];
    intermediate_states_buffer [pool_size, seq_len, num_v_heads, 128, 128] -> output as v, final_state as initial_state,
    intermediate_states as intermediate_states_buffer.
    """
    _demand_dsl()
    pool, buffer = initial_state.clone(), intermediate_states_buffer.clone()
    output, _ = flashinfer.gdn_decode.gated_delta_rule_mtp(
        *(q, k, v, pool, initial_state_indices, A_log, a, dt_bias, b),
        scale=scale or None,
        intermediate_states_buffer=buffer,
        disable_state_update=False,
        use_qk_l2norm=False,
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
    """flashinfer.gdn_prefill.chunk_gated_delta_rule, whose g is the gate itself and not its logarithm.

    q, k [total_seq_len, num_q_heads, 128]; v [total_seq_len, num_v_heads, 128]; state [num_seqs, num_v_heads, 128,
    128]; a, b [total_seq_len, num_v_heads]; cu_seqlens [num_seqs + 1] int64 -> output as v, new_state as state. Up to
    0.6 the kernel would wait forever for the first chunk of a sequence without tokens: such are left out of the call,
    and their states stay where the others are written to.
    """
    log_g, beta = gates(A_log, a, dt_bias, b)
    rows, starts = with_tokens(cu_seqlens)
    new_state = state.clone()
    output, new_state[rows] = flashinfer.gdn_prefill.chunk_gated_delta_rule(
        *(q, k, v, log_g.exp(), beta),
        scale=scale or None,
        initial_state=state[rows],
        output_final_state=True,
        cu_seqlens=starts,
    )
    return {"output": output, "new_state": new_state}


def _demand_dsl() -> None:
    if importlib.util.find_spec("cutlass") is None:
        raise Unavailable("missing", "flashinfer.gdn_decode needs nvidia-cutlass-dsl, which is not installed")

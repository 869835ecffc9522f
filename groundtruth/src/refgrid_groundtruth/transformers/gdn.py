"""The gated delta rule by Qwen3-Next's own PyTorch functions, run with transformers 5.23.0, also read in 5.12.1.

Where Flash Linear Attention is installed the model calls its kernels under the same names; here the function written
in PyTorch is meant, so it is unwrapped.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import torch
from transformers.models.qwen3_next import modeling_qwen3_next

from refgrid_groundtruth import Unavailable
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
    """torch_recurrent_gated_delta_rule of one token.

    q, k [batch_size, 1, num_q_heads, d]; v [batch_size, 1, num_v_heads, d]; state [batch_size, num_v_heads, d_v, d_k];
    A_log, dt_bias [num_v_heads]; a, b [batch_size, 1, num_v_heads] -> output as v, new_state as state. Raises
    Unavailable("unsupported") for another scale than 1 / sqrt(d), which the function always takes.
    """
    output, new_state = _recurrent(q, k, v, state, gates(A_log, a, dt_bias, b), scale)
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
    """torch_recurrent_gated_delta_rule token by token, as it gives the state after the last one only.

    q, k [batch_size, seq_len, num_q_heads, d]; v [batch_size, seq_len, num_v_heads, d]; initial_state [pool_size,
    num_v_heads, d_v, d_k]; initial_state_indices [batch_size]; a, b [batch_size, seq_len, num_v_heads];
    intermediate_states_buffer [pool_size, seq_len, num_v_heads, d_v, d_k] -> output as v, final_state as initial_state,
    intermediate_states as intermediate_states_buffer. Raises Unavailable("unsupported") for padding, which the function
    does not know, and as gdn_decode.
    """
    demand_no_padding(initial_state_indices)
    slots = initial_state_indices.long()
    gate, state = gates(A_log, a, dt_bias, b), initial_state[slots]
    outputs, pool, buffer = [], initial_state.clone(), intermediate_states_buffer.clone()
    for t in range(q.shape[1]):
        now = slice(t, t + 1)
        output, state = _recurrent(q[:, now], k[:, now], v[:, now], state, (gate[0][:, now], gate[1][:, now]), scale)
        outputs.append(output)
        buffer[: len(q), t] = state
    pool[slots] = state
    return {"output": torch.cat(outputs, dim=1), "final_state": pool, "intermediate_states": buffer}


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
    """torch_chunk_gated_delta_rule of one sequence at a time; those without tokens are left out, their states stay.

    q, k [total_seq_len, num_q_heads, d]; v [total_seq_len, num_v_heads, d]; state [num_seqs, num_v_heads, d_v, d_k];
    a, b [total_seq_len, num_v_heads]; cu_seqlens [num_seqs + 1] -> output as v, new_state as state. Raises
    Unavailable("unsupported") as gdn_decode.
    """
    _demand_scale(scale, q.shape[-1])
    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)
    rows, starts = with_tokens(cu_seqlens)
    q, k = _by_value_head(q, v.shape[1]), _by_value_head(k, v.shape[1])
    outputs, new_state, gate = [], state.clone(), gates(A_log, a, dt_bias, b)
    for row, (start, end) in zip(rows.tolist(), pairwise(starts.tolist()), strict=True):
        inputs = (each[None, start:end] for each in (q, k, v, *gate))
        output, moved = rule(*inputs, initial_state=state[row][None].mT, output_final_state=True)
        outputs.append(output[0])
        new_state[row] = moved[0].mT
    return {"output": torch.cat(outputs), "new_state": new_state}


def _recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    gate: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and next state [n, num_v_heads, d_v, d_k]; the function's own states are [n, num_v_heads, d_k, d_v]."""
    _demand_scale(scale, q.shape[-1])
    rule = inspect.unwrap(modeling_qwen3_next.torch_recurrent_gated_delta_rule)
    q, k = _by_value_head(q, v.shape[2]), _by_value_head(k, v.shape[2])
    output, moved = rule(q, k, v, *gate, initial_state=state.mT, output_final_state=True)
    return output, moved.mT.contiguous()


def _by_value_head(x: torch.Tensor, num_v_heads: int) -> torch.Tensor:
    """The head that each value head reads: [..., heads, d] -> [..., num_v_heads, d]; older releases want it so."""
    return x.repeat_interleave(num_v_heads // x.shape[-2], dim=-2)


def _demand_scale(scale: float, d: int) -> None:
    if scale and not math.isclose(scale, d**-0.5, rel_tol=1e-6):
        raise Unavailable("unsupported", f"scale is {scale} but the function's is {d**-0.5}")

"""The gated delta rule (Yang, Kautz and Hatamizadeh 2024, https://arxiv.org/abs/2412.06464), as Qwen3-Next uses it.

Each value head holds a state S [d_v, d_k] that maps keys to values. A token decays it, and corrects what it holds for
the token's key towards the token's value:

    S = g S,    delta = beta (v - S k),    S = S + delta k^T,    o = scale S q
    g = exp(-exp(A_log) softplus(a + dt_bias)),    beta = sigmoid(b)

d_v = d_k = d = head_size. Value head h reads query and key head h // (num_v_heads / num_q_heads). Keys come normalised.
"""

import torch

CHUNK = 64  # tokens of one sequence that are solved for at once
TILE_ELEMENTS = 2**20  # of the largest temporaries of a prefill: 4 MiB in float32, about a CPU's cache


def gdn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One new token a sequence, as flashinfer.gdn_decode.gated_delta_rule_decode_pretranspose.

    q, k [batch_size, 1, num_q_heads, d]; v [batch_size, 1, num_v_heads, d]; state [batch_size, num_v_heads, d_v, d_k]
    float32; A_log, dt_bias [num_v_heads]; a, b [batch_size, 1, num_v_heads]; scale, 0 for 1 / sqrt(d)
    -> output as v; new_state as state.
    """
    log_g, beta = gates(A_log, a, dt_bias, b)
    o, new_state = step(q[:, 0], k[:, 0], v[:, 0], state, log_g[:, 0], beta[:, 0])
    return (o * (scale or q.shape[-1] ** -0.5))[:, None].to(v.dtype), new_state


def gdn_mtp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    intermediate_states_buffer: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A few draft tokens a sequence, whose states lie in a pool, as flashinfer.gdn_decode.gated_delta_rule_mtp.

    q, k [batch_size, seq_len, num_q_heads, d]; v [batch_size, seq_len, num_v_heads, d]; initial_state [pool_size,
    num_v_heads, d_v, d_k] float32; initial_state_indices [batch_size], negative for padding; a, b [batch_size, seq_len,
    num_v_heads]; intermediate_states_buffer [pool_size, seq_len, num_v_heads, d_v, d_k] float32; the rest as gdn_decode
    -> output as v, 0 for padding; final_state, the pool with the slots of the batch updated; intermediate_states, the
    buffer with the state after each token of sequence i in row i.
    """
    log_g, beta = gates(A_log, a, dt_bias, b)
    output, final_state = torch.zeros_like(v), initial_state.clone()
    intermediate_states = intermediate_states_buffer.clone()
    row = (initial_state_indices >= 0).nonzero()[:, 0]
    slot = initial_state_indices[row].long()
    state = initial_state[slot]
    for t in range(q.shape[1]):
        o, state = step(q[row, t], k[row, t], v[row, t], state, log_g[row, t], beta[row, t])
        output[row, t] = (o * (scale or q.shape[-1] ** -0.5)).to(v.dtype)
        intermediate_states[row, t] = state
    final_state[slot] = state
    return output, final_state, intermediate_states


def gdn_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of any length, a chunk at a time, as flashinfer.gdn_prefill.chunk_gated_delta_rule.

    q, k [total_seq_len, num_q_heads, d]; v [total_seq_len, num_v_heads, d]; state [num_seqs, num_v_heads, d_v, d_k]
    float32; a, b [total_seq_len, num_v_heads]; cu_seqlens [num_seqs + 1], where each sequence starts; the rest as
    gdn_decode -> output as v; new_state as state: that of a sequence without tokens is unchanged.
    """
    (total, heads, d), (start, end) = v.shape, (cu_seqlens[:-1, None], cu_seqlens[1:, None])
    log_g, beta = gates(A_log, a, dt_bias, b)
    length, order = cu_seqlens.diff().sort(descending=True, stable=True)
    lengths = length.tolist()
    at_once = max(1, TILE_ELEMENTS // (CHUNK * heads * d))
    # Beyond the end of a sequence log g = beta = 0 leave S as it is, and the output goes to a last row that is cut off.
    output, new_state = v.new_empty(total + 1, heads, d), state.clone()
    for begin in range(0, max(lengths, default=0), CHUNK):
        longer = order[: sum(n > begin for n in lengths)]
        for first in range(0, len(longer), at_once):
            part, size = longer[first : first + at_once], min(CHUNK, lengths[first] - begin)
            token = start[part] + torch.arange(begin, begin + size, device=v.device)
            inside = token < end[part]
            row, token = torch.where(inside, token, total), torch.minimum(token, end[part] - 1)
            queries, keys, values = (by_value_head(x[token], heads).transpose(1, 2) for x in (q, k, v))
            decay, step_size = ((x[token] * inside[..., None]).transpose(1, 2) for x in (log_g, beta))
            o, new_state[part] = chunk(queries, keys, values, new_state[part], decay, step_size)
            output[row] = (o * (scale or d**-0.5)).transpose(1, 2).to(v.dtype)
    return output[:total], new_state


def gates(
    A_log: torch.Tensor, a: torch.Tensor, dt_bias: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """log g = -exp(A_log) softplus(a + dt_bias) and beta = sigmoid(b): a, b [..., num_v_heads] -> likewise, float32."""
    return -A_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float()), b.float().sigmoid()


def by_value_head(x: torch.Tensor, num_v_heads: int) -> torch.Tensor:
    """The head that each value head reads, in float32: x [..., heads, d] -> [..., num_v_heads, d]."""
    return x.float().repeat_interleave(num_v_heads // x.shape[-2], dim=-2)


def step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, log_g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of n sequences, straight from the equations.

    q, k [n, num_q_heads, d]; v [n, num_v_heads, d]; state [n, num_v_heads, d_v, d_k]; log_g, beta [n, num_v_heads]
    -> S q [n, num_v_heads, d_v] float32, not scaled; the next state.
    """
    q, k = by_value_head(q, v.shape[1]), by_value_head(k, v.shape[1])
    s = state * log_g.exp()[..., None, None]
    delta = beta[..., None] * (v.float() - (s @ k[..., None])[..., 0])
    s.addcmul_(delta[..., None], k[..., None, :])
    return (s @ q[..., None])[..., 0], s


def chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, log_g: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some tokens of n sequences at once, by forward substitution (the WY representation of the product of steps).

    q, k, v [n, num_v_heads, size, d]; state [n, num_v_heads, d_v, d_k]; log_g, beta [n, num_v_heads, size]; float32.
    With p_i = g_1 ... g_i and r_ij = p_i / p_j, token i finds the state p_i S + sum of r_ij delta_j k_j^T over j < i:
    (I + diag(beta) (r * K K^T)) delta = diag(beta) (V - diag(p) K S^T), r strictly below the diagonal
    -> S q [n, num_v_heads, size, d_v], not scaled; the state after the last token.
    """
    log_p = log_g.double().cumsum(-1)  # to minus thousands, where float32 would leave log r three decimals
    p = log_p.exp().float()[..., None]
    r = (log_p[..., :, None] - log_p[..., None, :]).tril().float().exp().tril()
    system = beta[..., None] * r * (k @ k.mT)
    target = beta[..., None] * (v - p * (k @ state.mT))
    delta = torch.linalg.solve_triangular(system, target, upper=False, unitriangular=True)
    o = p * (q @ state.mT) + (r * (q @ k.mT)) @ delta
    return o, p[..., -1:, :] * state + (r[..., -1, :, None] * delta).mT @ k

"""The gated delta rule in float64, one token after the other: S = g S (I - beta k k^T) + beta v k^T."""

from __future__ import annotations

from bisect import bisect_left

import torch


class _Scan:
    """All sequences in float64, each at its own state; q and k are repeated for each value head here."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        A_log: torch.Tensor,  # noqa: N803 - the definition's name
        a: torch.Tensor,
        dt_bias: torch.Tensor,
        b: torch.Tensor,
        scale: float,
    ) -> None:
        """q, k [..., num_q_heads, d]; v [..., num_v_heads, d]; a, b [..., num_v_heads]."""
        x = a.double() + dt_bias.double()
        softplus = torch.logaddexp(x, torch.zeros_like(x))
        self.g = torch.exp(-torch.exp(A_log.double()) * softplus)
        self.beta = 1 / (1 + torch.exp(-b.double()))
        self.q, self.k, self.v = q, k, v
        self.heads = torch.arange(v.shape[-2], device=v.device) // (v.shape[-2] // q.shape[-2])
        self.scale = q.shape[-1] ** -0.5 if scale == 0 else scale

    def token(self, at: tuple[torch.Tensor | slice | int, ...], state: torch.Tensor) -> torch.Tensor:
        """Move `state` [n, num_v_heads, d_v, d_k] past the tokens `at`, in place -> output [n, num_v_heads, d_v]."""
        q, k = (x[at][:, self.heads].double() for x in (self.q, self.k))
        beta = self.beta[at][..., None]
        held = torch.einsum("nhvk,nhk->nhv", state, k)
        state -= torch.einsum("nhv,nhk->nhvk", beta * held, k)
        state *= self.g[at][..., None, None]
        state += torch.einsum("nhv,nhk->nhvk", beta * self.v[at].double(), k)
        return torch.einsum("nhvk,nhk->nhv", state, q) * self.scale


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
    """q, k [batch_size, 1, num_q_heads, d]; v [batch_size, 1, num_v_heads, d]; state [batch_size, num_v_heads, d, d].

    A_log, dt_bias [num_v_heads]; a, b [batch_size, 1, num_v_heads] -> output as v, new_state as state.
    """
    moved = state.double()
    output = _Scan(q, k, v, A_log, a, dt_bias, b, scale).token((slice(None), 0), moved)
    return {"output": output[:, None].to(v.dtype), "new_state": moved.to(state.dtype)}


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
    """Sequence by sequence; padding is passed over.

    q, k [batch_size, seq_len, num_q_heads, d]; v [batch_size, seq_len, num_v_heads, d]; initial_state [pool_size,
    num_v_heads, d, d]; initial_state_indices [batch_size]; intermediate_states_buffer [pool_size, seq_len, num_v_heads,
    d, d] -> output as v, final_state as initial_state, intermediate_states as intermediate_states_buffer.
    """
    scan = _Scan(q, k, v, A_log, a, dt_bias, b, scale)
    output, pool, buffer = torch.zeros_like(v), initial_state.clone(), intermediate_states_buffer.clone()
    for row, slot in enumerate(initial_state_indices.tolist()):
        if slot >= 0:
            state = initial_state[slot][None].double()
            for t in range(q.shape[1]):
                output[row, t] = scan.token((slice(row, row + 1), t), state)[0].to(v.dtype)
                buffer[row, t] = state[0].to(buffer.dtype)
            pool[slot] = state[0].to(pool.dtype)
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
    """Token t of every sequence that has one, then token t + 1; longest sequences first, so those are the first rows.

    q, k [total_seq_len, num_q_heads, d]; v [total_seq_len, num_v_heads, d]; state [num_seqs, num_v_heads, d, d]; a, b
    [total_seq_len, num_v_heads]; cu_seqlens [num_seqs + 1] -> output as v, new_state as state.
    """
    scan = _Scan(q, k, v, A_log, a, dt_bias, b, scale)
    lengths = cu_seqlens.diff().tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    negated = [-lengths[row] for row in order]  # ascending, for bisect
    rows = torch.tensor(order, dtype=torch.int64, device=state.device)
    output, start, moved = torch.empty_like(v), cu_seqlens[rows], state[rows].double()
    for t in range(max(lengths, default=0)):
        longer = bisect_left(negated, -t)
        at = start[:longer] + t
        output[at] = scan.token((at,), moved[:longer]).to(v.dtype)
    new_state = torch.empty_like(state)
    new_state[rows] = moved.to(state.dtype)
    return {"output": output, "new_state": new_state}

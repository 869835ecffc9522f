"""The gated delta rule one token and one head at a time, straight from the definitions' words; and inputs to try it on.

`decode`, `mtp` and `prefill` draw inputs by name; sizes are the test's own, keys are of length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from adapters import unchanged
from torch import Tensor

Inputs = dict[str, Any]


def token(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_rate: float, x: float, b: float, scale: float
) -> tuple[Tensor, Tensor]:
    """One head: q, k [d_k], v [d_v], state [d_v, d_k]; x = a + dt_bias -> output [d_v], the next state."""
    softplus = x if x > 20 else math.log1p(math.exp(x))
    g = math.exp(-math.exp(log_rate) * softplus)
    beta = 0.0 if b < -700 else 1 / (1 + math.exp(-b))
    state = g * state
    delta = beta * (v - state @ k)
    state = state + torch.outer(delta, k)
    return scale * (state @ q), state


def tokens(
    inputs: Inputs, at: Sequence[tuple[int, ...]], state: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """The tokens `at` in order; state [heads, d_v, d_k] -> outputs [tokens, heads, d_v], the state after each."""
    q, k, v = (inputs[name].to(dtype) for name in "qkv")
    heads, group = v.shape[-2], v.shape[-2] // q.shape[-2]
    scale = inputs["scale"] or 1 / math.sqrt(q.shape[-1])
    state, outputs, states = state.to(dtype), [], []
    for place in at:
        rows = []
        for head in range(heads):
            x = float(inputs["a"][place][head]) + float(inputs["dt_bias"][head])
            gates = float(inputs["A_log"][head]), x, float(inputs["b"][place][head])
            vectors = q[place][head // group], k[place][head // group], v[place][head]
            rows.append(token(*vectors, state[head], *gates, scale))
        outputs.append(torch.stack([out for out, _ in rows]))
        state = torch.stack([moved for _, moved in rows])
        states.append(state)
    return torch.stack(outputs) if outputs else v.new_zeros(0, heads, v.shape[-1]), states


def gdn_decode(dtype: torch.dtype = torch.float64, **inputs: Any) -> dict[str, Tensor]:
    batch = range(len(inputs["q"]))
    moved = [tokens(inputs, [(row, 0)], inputs["state"][row], dtype) for row in batch]
    return {
        "output": torch.stack([out for out, _ in moved]),
        "new_state": torch.stack([states[-1] for _, states in moved]),
    }


def gdn_mtp(dtype: torch.dtype = torch.float64, **inputs: Any) -> dict[str, Tensor]:
    output = torch.zeros(inputs["v"].shape, dtype=dtype)
    pool, buffer = inputs["initial_state"].to(dtype), inputs["intermediate_states_buffer"].to(dtype)
    pool, buffer = pool.clone(), buffer.clone()
    for row, slot in enumerate(inputs["initial_state_indices"].tolist()):
        if slot >= 0:
            at = [(row, t) for t in range(inputs["q"].shape[1])]
            output[row], states = tokens(inputs, at, inputs["initial_state"][slot], dtype)
            buffer[row], pool[slot] = torch.stack(states), states[-1]
    return {"output": output, "final_state": pool, "intermediate_states": buffer}


def gdn_prefill(dtype: torch.dtype = torch.float64, **inputs: Any) -> dict[str, Tensor]:
    output = torch.zeros(inputs["v"].shape, dtype=dtype)
    new_state = inputs["state"].to(dtype).clone()
    for row, (start, end) in enumerate(pairwise(inputs["cu_seqlens"].tolist())):
        at = [(place,) for place in range(start, end)]
        output[start:end], states = tokens(inputs, at, inputs["state"][row], dtype)
        new_state[row] = states[-1] if states else new_state[row]
    return {"output": output, "new_state": new_state}


# ---- inputs


def drawn(
    shape: tuple[int, ...], heads: tuple[int, int], d: int, dtype: torch.dtype, scale: float, seed: int
) -> Inputs:
    """Everything but states, in the definitions' order; rates of 0.5 to 16, gates from almost 0 to almost 1."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    k = normal(*shape, heads[0], d)
    return {
        "q": normal(*shape, heads[0], d).to(dtype),
        "k": (k / k.norm(dim=-1, keepdim=True)).to(dtype),
        "v": normal(*shape, heads[1], d).to(dtype),
        "A_log": torch.linspace(math.log(0.5), math.log(16), heads[1]),
        "a": normal(*shape, heads[1]).to(dtype),
        "dt_bias": torch.linspace(2, -8, heads[1]),
        "b": (2 * normal(*shape, heads[1])).to(dtype),
        "scale": scale,
    }


def states(count: int, heads: int, d: int, seed: int = 1) -> Tensor:
    return torch.randn(count, heads, d, d, generator=torch.Generator().manual_seed(seed))


def decode(
    batch: int,
    heads: tuple[int, int] = (2, 4),
    d: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 0.0,
    seed: int = 0,
) -> Inputs:
    return {**drawn((batch, 1), heads, d, dtype, scale, seed), "state": states(batch, heads[1], d)}


def mtp(
    slots: list[int],
    seq_len: int,
    pool: int,
    heads: tuple[int, int] = (2, 4),
    d: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 0.0,
    seed: int = 0,
) -> Inputs:
    """The buffer holds NaN, as memory does that nobody has written yet."""
    return {
        **drawn((len(slots), seq_len), heads, d, dtype, scale, seed),
        "initial_state": states(pool, heads[1], d),
        "initial_state_indices": torch.tensor(slots, dtype=torch.int32),
        "intermediate_states_buffer": torch.full((pool, seq_len, heads[1], d, d), math.nan),
    }


def prefill(
    lengths: list[int],
    heads: tuple[int, int] = (2, 4),
    d: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 0.0,
    seed: int = 0,
) -> Inputs:
    return {
        **drawn((sum(lengths),), heads, d, dtype, scale, seed),
        "state": states(len(lengths), heads[1], d),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
    }


def agree(adapter: Callable[..., dict[str, Tensor]], op: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The adapter gives what the loops give, and leaves its inputs as they are, bit for bit."""
    given, expected = unchanged(adapter, **inputs), globals()[op](**inputs)
    assert set(given) == set(expected)
    for name, tensor in expected.items():
        assert given[name].dtype == (inputs["v"].dtype if name == "output" else torch.float32)
        bound = 1e-2 if given[name].dtype == torch.bfloat16 else 5e-6
        torch.testing.assert_close(given[name].double(), tensor.double(), rtol=bound, atol=bound, equal_nan=True)
    return given

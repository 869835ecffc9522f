"""The gated delta rule with keys that each name one column of the state."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer

QK_HEADS, V_HEADS, D = 4, 8, 128
UNTOUCHED = 5.0  # what the buffer of drafts holds before

# Of value head h: exp(A_log) is 1 or 2 and softplus(a + dt_bias) = softplus(0) = log 2, so g is 1/2 or 1/4; b is 0 or
# so large that beta is 1/2 or 1.
GATES = [(0.5 if head % 2 == 0 else 0.25, 0.5 if head < V_HEADS // 2 else 1.0) for head in range(V_HEADS)]


def _state(number: int) -> torch.Tensor:
    """[V_HEADS, D, D]: the entries tell head, row and column apart."""
    head, row, column = (torch.arange(size).float() for size in (V_HEADS, D, D))
    return head[:, None, None] + 2 * (row % 7)[:, None] + 8 * (column % 5) + number


def _tokens(numbers: list[int]) -> dict[str, torch.Tensor]:
    """Token n has in head h the key e_c and the query e_c + e_(c+1) with c = 5 h + 3 n; its values are n + row % 3.

    Inputs are [tokens, ...].
    """
    q, k = (torch.zeros(len(numbers), QK_HEADS, D) for _ in "qk")
    for token, number in enumerate(numbers):
        for head in range(QK_HEADS):
            column = _column(number, head)
            k[token, head, column] = 1
            q[token, head, column : column + 2] = 1
    v = torch.stack([_value(number).expand(V_HEADS, D) for number in numbers])
    b = torch.tensor([0.0 if beta == 0.5 else 100.0 for _, beta in GATES]).expand(len(numbers), V_HEADS)
    a = torch.full((len(numbers), V_HEADS), 1.5)
    return {name: x.to(torch.bfloat16) for name, x in (("q", q), ("k", k), ("v", v), ("a", a), ("b", b))}


def _column(number: int, qk_head: int) -> int:
    return 5 * qk_head + 3 * number


def _value(number: int) -> torch.Tensor:
    return number + torch.arange(D) % 3.0


def _after(state: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The state decays, and in column c it keeps 1 - beta of what it held and takes beta of the value.

    The output is the sum of columns c and c + 1 over sqrt(D): [V_HEADS, D, D], [V_HEADS, D].
    """
    state, output = state.clone(), torch.empty(V_HEADS, D)
    for head, (g, beta) in enumerate(GATES):
        column = _column(number, head // (V_HEADS // QK_HEADS))
        state[head] *= g
        state[head, :, column] = (1 - beta) * state[head, :, column] + beta * _value(number)
        output[head] = (state[head, :, column] + state[head, :, column + 1]) / math.sqrt(D)
    return state, output


def _constants() -> dict[str, object]:
    a_log = torch.tensor([0.0 if g == 0.5 else math.log(2) for g, _ in GATES])
    return {"A_log": a_log, "dt_bias": torch.full((V_HEADS,), -1.5), "scale": 0.0}


def _gdn_decode() -> Answer:
    """Two sequences."""
    moved = [_after(_state(10 * n), n) for n in (1, 2)]
    given = {name: x[:, None] for name, x in _tokens([1, 2]).items()}
    output = torch.stack([out for _, out in moved])[:, None].to(torch.bfloat16)
    state = torch.stack([_state(10), _state(20)])
    return {**given, "state": state, **_constants()}, {
        "output": output,
        "new_state": torch.stack([state for state, _ in moved]),
    }


def _gdn_mtp() -> Answer:
    """Two sequences of two tokens, at slots 2 and 0 of three."""
    pool = torch.stack([_state(10 * slot) for slot in range(3)])
    buffer = torch.full((3, 2, V_HEADS, D, D), UNTOUCHED)
    final, written, output = pool.clone(), buffer.clone(), torch.empty(2, 2, V_HEADS, D)
    for row, slot in enumerate((2, 0)):
        for t in range(2):
            final[slot], output[row, t] = _after(final[slot], 1 + 2 * row + t)
            written[row, t] = final[slot]
    given = {name: x.unflatten(0, (2, 2)) for name, x in _tokens([1, 2, 3, 4]).items()}
    indices = torch.tensor([2, 0], dtype=torch.int32)
    pools = {"initial_state": pool, "initial_state_indices": indices, "intermediate_states_buffer": buffer}
    expected = {"output": output.to(torch.bfloat16), "final_state": final, "intermediate_states": written}
    return {**given, **pools, **_constants()}, expected


def _gdn_prefill() -> Answer:
    """Sequences of two tokens, of none and of one."""
    state = torch.stack([_state(10 * n) for n in range(3)])
    new_state, output = state.clone(), torch.empty(3, V_HEADS, D)
    for token, sequence in enumerate((0, 0, 2)):
        new_state[sequence], output[token] = _after(new_state[sequence], token + 1)
    given = {**_tokens([1, 2, 3]), "state": state, "cu_seqlens": torch.tensor([0, 2, 2, 3]), **_constants()}
    return given, {"output": output.to(torch.bfloat16), "new_state": new_state}


CASES: dict[str, Callable[[], Answer]] = {"gdn_decode": _gdn_decode, "gdn_mtp": _gdn_mtp, "gdn_prefill": _gdn_prefill}

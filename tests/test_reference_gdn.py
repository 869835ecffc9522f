"""References of the gated delta rule: against loops in float64, against answers known beforehand, and their cost."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import naive_gdn as naive
import peak_memory
import pytest
import torch
from torch import Tensor

from refgrid_references import gdn_decode, gdn_mtp, gdn_prefill

gdn = importlib.import_module("refgrid_references.gdn")

OUTPUTS: dict[Callable[..., Any], tuple[str, ...]] = {
    gdn_decode: ("output", "new_state"),
    gdn_mtp: ("output", "final_state", "intermediate_states"),
    gdn_prefill: ("output", "new_state"),
}
HEADS = [(1, 1), (2, 2), (2, 4), (1, 3)]
LENGTHS = [
    pytest.param([1], id="one token"),
    pytest.param([63], id="a chunk but one"),
    pytest.param([64], id="a chunk"),
    pytest.param([65], id="a chunk and one"),
    pytest.param([129], id="two chunks and one"),
    pytest.param([0], id="none"),
    pytest.param([0, 5, 0, 70, 1, 0], id="some without tokens"),
    pytest.param([1] * 7, id="one each"),
    pytest.param([3, 130, 64, 2], id="each with other chunks"),
]


def run(op: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs by name; the inputs must be as before, bit for bit."""
    before = {name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    result = op(**inputs)
    for name, value in before.items():
        torch.testing.assert_close(inputs[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name} was changed")
    return dict(zip(OUTPUTS[op], result, strict=True))


def agree(op: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The reference gives what the loops give: states to float32, outputs to their dtype."""
    found, expected = run(op, inputs), getattr(naive, op.__name__)(**inputs)
    for name, tensor in expected.items():
        dtype = inputs["v"].dtype if name == "output" else torch.float32
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape)
        bound = 1e-2 if dtype == torch.bfloat16 else 5e-6
        close(found[name], tensor, bound)
    return found


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=bound, atol=bound, equal_nan=True)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_is_the_formula(batch: int, dtype: torch.dtype, scale: float, heads: tuple[int, int]) -> None:
    agree(gdn_decode, naive.decode(batch, heads, dtype=dtype, scale=scale))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize(
    ("slots", "seq_len", "pool"), [([0], 2, 1), ([2, 0], 3, 5), ([-1, 1, -2, 3], 4, 4), ([-1], 2, 1), ([3, 1, 2], 8, 4)]
)
def test_mtp_is_the_formula(slots: list[int], seq_len: int, pool: int, scale: float, heads: tuple[int, int]) -> None:
    agree(gdn_mtp, naive.mtp(slots, seq_len, pool, heads, dtype=torch.float32, scale=scale))


@pytest.fixture(params=["as-is", "small-chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own chunks and tiles, and ones so small that each size above has several of each."""
    if request.param == "small-chunks":
        monkeypatch.setattr(gdn, "CHUNK", 5)
        monkeypatch.setattr(gdn, "TILE_ELEMENTS", 100)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(("heads", "scale"), [((2, 4), 0.0), ((1, 3), 0.3)], ids=str)
def test_prefill_is_the_formula(lengths: list[int], heads: tuple[int, int], scale: float) -> None:
    agree(gdn_prefill, naive.prefill(lengths, heads, dtype=torch.float32, scale=scale))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_prefill_in_bfloat16_rounds_once(lengths: list[int]) -> None:
    agree(gdn_prefill, naive.prefill(lengths))


# ---- gates as strong and as weak as they go


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("every", [2, 7, 50])
def test_tokens_that_clear_the_state_leave_what_comes_after_exact(every: int) -> None:
    """Log gates of hundreds stand beside those of a thousandth: their running sum in float32 would lose the latter."""
    inputs = naive.prefill([200], dtype=torch.float32)
    inputs["dt_bias"][:] = -6
    inputs["a"][::every] = 38
    agree(gdn_prefill, inputs)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("a", [-1e4, -40.0, 0.0, 40.0, 1e4])
@pytest.mark.parametrize("b", [-1e4, 0.0, 1e4])
def test_gates_at_their_ends(a: float, b: float) -> None:
    for op, inputs in (
        (gdn_prefill, naive.prefill([70, 3], d=4, dtype=torch.float32)),
        (gdn_decode, naive.decode(2, d=4, dtype=torch.float32)),
        (gdn_mtp, naive.mtp([1], 3, 2, d=4, dtype=torch.float32)),
    ):
        inputs["a"][:], inputs["b"][:] = a, b
        agree(op, inputs)


@pytest.mark.usefixtures("cut")
def test_beta_zero_only_decays() -> None:
    inputs = naive.prefill([70], dtype=torch.float32)
    inputs["b"][:] = -1e4
    inputs["a"][:], inputs["dt_bias"][:], inputs["A_log"][:] = 0, math.log(math.exp(0.01) - 1), 0  # log g = -0.01
    close(run(gdn_prefill, inputs)["new_state"], inputs["state"] * math.exp(-0.7), 1e-6)


@pytest.mark.usefixtures("cut")
def test_with_beta_one_and_no_decay_the_state_holds_the_value_of_each_key() -> None:
    inputs = naive.prefill([65], (1, 1), d=80, dtype=torch.float32)
    inputs["k"] = torch.eye(80)[torch.randperm(80, generator=torch.Generator().manual_seed(3))[:65], None]
    inputs["a"][:], inputs["b"][:] = -1e4, 1e4
    state = run(gdn_prefill, inputs)["new_state"][0, 0]
    close(inputs["k"][:, 0] @ state.T, inputs["v"][:, 0], 1e-6)


@pytest.mark.usefixtures("cut")
def test_a_key_that_comes_again_and_again_holds_its_last_value() -> None:
    inputs = naive.prefill([129], (1, 1), dtype=torch.float32)
    inputs["k"][:] = torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0])
    inputs["q"][:] = inputs["k"]
    inputs["a"][:], inputs["b"][:] = -1e4, 1e4
    found = agree(gdn_prefill, inputs)
    close(found["output"], inputs["v"] / math.sqrt(8), 1e-6)


def test_one_number_by_hand() -> None:
    """S = 3: decayed 1.5, delta = (5 - 1.5) / 2 = 1.75, S = 3.25, output 2 * 3.25."""
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1)
    gates = {"A_log": torch.zeros(1), "a": zero, "dt_bias": torch.zeros(1), "b": zero}
    output, state = gdn_decode(2 * one, one, 5 * one, 3 * one, **gates, scale=0.0)
    assert (output.item(), state.item()) == (6.5, 3.25)
    assert gdn_decode(2 * one, one, 5 * one, 3 * one, **gates, scale=0.5)[0].item() == 3.25


# ---- states: whose they are, and what stays


def test_value_heads_in_a_row_share_a_key_head() -> None:
    inputs = naive.decode(1, (2, 4), dtype=torch.float32)
    found = run(gdn_decode, inputs)
    other = {**inputs, "k": inputs["k"].clone(), "q": inputs["q"].clone()}
    other["k"][0, 0, 1] = other["k"][0, 0, 1].roll(1)
    changed = (run(gdn_decode, other)["new_state"] != found["new_state"]).flatten(2).any(2)
    assert changed.tolist() == [[False, False, True, True]]


def test_rows_of_the_state_are_values_and_columns_are_keys() -> None:
    inputs = naive.decode(1, (1, 1), d=4, dtype=torch.float32)
    inputs["state"].zero_()
    inputs["k"][:] = torch.tensor([0.0, 0, 1, 0])
    inputs["v"][:] = torch.tensor([0.0, 5, 0, 0])
    inputs["b"][:] = 1e4
    assert run(gdn_decode, inputs)["new_state"][0, 0].nonzero().tolist() == [[1, 2]]


@pytest.mark.usefixtures("cut")
def test_a_sequence_without_tokens_keeps_its_state_bit_for_bit() -> None:
    inputs = naive.prefill([0, 3, 0], dtype=torch.float32)
    inputs["state"][2, 0, 0, 0] = math.nan
    found = run(gdn_prefill, inputs)["new_state"]
    torch.testing.assert_close(found[::2], inputs["state"][::2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("cut")
def test_a_sequence_in_two_parts_is_the_whole() -> None:
    inputs = naive.prefill([130], dtype=torch.float32)
    whole = run(gdn_prefill, inputs)
    state = inputs["state"]
    outputs: list[Tensor] = []
    for part in (slice(0, 33), slice(33, 130)):
        cut = {name: inputs[name][part] for name in ("q", "k", "v", "a", "b")}
        ends = torch.tensor([0, part.stop - part.start])
        found = run(gdn_prefill, {**inputs, **cut, "state": state, "cu_seqlens": ends})
        state, outputs = found["new_state"], [*outputs, found["output"]]
    close(torch.cat(outputs), whole["output"], 2e-6)
    close(state, whole["new_state"], 2e-6)


def test_prefill_mtp_and_decode_are_one_rule() -> None:
    inputs = naive.mtp([1, 0], 5, 2, dtype=torch.float32)
    drafts = run(gdn_mtp, inputs)
    flat = {name: inputs[name].flatten(0, 1) for name in ("q", "k", "v", "a", "b")}
    rest = {name: inputs[name] for name in ("A_log", "dt_bias", "scale")}
    state = inputs["initial_state"].flip(0)
    whole = run(gdn_prefill, {**flat, **rest, "state": state, "cu_seqlens": torch.tensor([0, 5, 10])})
    close(drafts["output"].flatten(0, 1), whole["output"], 2e-6)
    close(drafts["final_state"].flip(0), whole["new_state"], 2e-6)
    for t in range(5):
        now = {name: inputs[name][:, t : t + 1] for name in ("q", "k", "v", "a", "b")}
        one = run(gdn_decode, {**now, **rest, "state": state})
        state = one["new_state"]
        close(one["output"], drafts["output"][:, t : t + 1], 2e-6)
        close(state, drafts["intermediate_states"][:, t], 2e-6)


def test_slots_rows_and_padding_that_nobody_names_stay_as_they_are() -> None:
    inputs = naive.mtp([3, -1], 2, 5, dtype=torch.float32)
    inputs["intermediate_states_buffer"] = torch.arange(5.0)[:, None, None, None, None].expand(5, 2, 4, 8, 8).clone()
    found = run(gdn_mtp, inputs)
    assert torch.equal(found["output"][1], torch.zeros(2, 4, 8))
    kept = [0, 1, 2, 4]
    assert torch.equal(found["final_state"][kept], inputs["initial_state"][kept])
    assert not torch.equal(found["final_state"][3], inputs["initial_state"][3])
    assert torch.equal(found["intermediate_states"][1:], inputs["intermediate_states_buffer"][1:])
    assert torch.equal(found["intermediate_states"][0, 1], found["final_state"][3])


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("name", ["q", "k", "v", "a", "b"])
def test_a_nan_stays_in_its_sequence_and_comes_after_its_token(name: str) -> None:
    inputs = naive.prefill([66, 67, 2], dtype=torch.float32)
    clean = run(gdn_prefill, inputs)
    inputs[name][66 + 10] = math.nan  # token 10 of the second sequence
    found = run(gdn_prefill, inputs)
    spoiled = found["output"].isnan().flatten(1).any(1)
    assert not spoiled[:66].any()
    assert not spoiled[133:].any()
    assert spoiled[76]
    assert not found["new_state"][::2].isnan().any()
    assert torch.equal(found["new_state"][::2], clean["new_state"][::2])


# ---- cost


def size_in_bytes(tensors: Any) -> int:
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, torch.Tensor))


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        pytest.param(gdn_decode, naive.decode(6, (4, 8), 128), id="decode"),
        pytest.param(gdn_mtp, naive.mtp([2, 0, 3], 4, 4, (4, 8), 128), id="mtp"),
        pytest.param(gdn_prefill, naive.prefill([700], (4, 8), 128), id="a long sequence"),
        pytest.param(gdn_prefill, naive.prefill([1] * 24, (4, 8), 128), id="many short sequences"),
        pytest.param(gdn_prefill, naive.prefill([0, 65, *[1] * 30], (4, 8), 128), id="one long among short ones"),
    ],
)
def test_peak_memory_is_below_four_times_inputs_and_outputs(op: Callable[..., Any], inputs: dict[str, Any]) -> None:
    data = size_in_bytes(inputs.values()) + size_in_bytes(op(**inputs))
    assert peak_memory.peak_bytes(lambda: op(**inputs)) < 4 * data


def test_many_sequences_are_taken_a_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = naive.prefill([65] * 60, (1, 2), 64)
    data = size_in_bytes(inputs.values()) + size_in_bytes(gdn_prefill(**inputs))
    whole = peak_memory.peak_bytes(lambda: gdn_prefill(**inputs))
    monkeypatch.setattr(gdn, "TILE_ELEMENTS", 64 * 2 * 64)
    assert peak_memory.peak_bytes(lambda: gdn_prefill(**inputs)) < min(data, whole / 2)

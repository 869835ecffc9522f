"""The reference of rotary embeddings: against loops in float64, and against answers known beforehand."""

from __future__ import annotations

import math
from typing import Any

import naive_rope as naive
import peak_memory
import pytest
import torch
from torch import Tensor

from refgrid_references import rope_with_cos_sin_cache_neox_style as rope

POSITIONS = [
    pytest.param([0], 1, id="the only one"),
    pytest.param([8], 9, id="the last"),
    pytest.param([3, 0, 8, 5], 9, id="in no order"),
    pytest.param([2, 2, 0, 2, 8, 8], 9, id="repeated"),
    pytest.param([], 3, id="no token"),
]


def run(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs by name; the inputs must be as before, bit for bit."""
    before = {name: value.clone() for name, value in inputs.items()}
    q_out, k_out = rope(**inputs)
    for name, value in before.items():
        assert same_bits(inputs[name], value), f"{name} was changed"
    return {"q_out": q_out, "k_out": k_out}


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def agree(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The reference gives what the loops give, to the last rounding of its dtype."""
    found, expected = run(inputs), naive.rope_with_cos_sin_cache_neox_style(**inputs)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (inputs["q"].dtype, tensor.shape)
        bound = 5e-3 if found[name].dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(found[name].double(), tensor, rtol=bound, atol=1e-6)
    return found


@pytest.mark.parametrize(("positions", "most"), POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_reference_is_the_formula(positions: list[int], most: int, dtype: torch.dtype) -> None:
    agree(naive.drawn(positions, most, dtype=dtype))


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (3, 3), (1, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(2, 2), (16, 16), (16, 2), (20, 12), (128, 64)], ids=str)
def test_any_heads_and_widths(heads: tuple[int, int], sizes: tuple[int, int]) -> None:
    agree(naive.drawn([6, 1, 6], 7, heads, sizes, torch.float32))


def test_numbers_beyond_rotary_dim_pass_bit_for_bit() -> None:
    inputs = naive.drawn([3, 1, 4], 5)
    for name in ("q", "k"):
        inputs[name][0, 0, 8:].view(torch.int16)[:] = 0x7FA5  # a NaN of its own
        inputs[name][1, :, 9], inputs[name][2, :, 15] = -0.0, math.inf
    found = run(inputs)
    for name in ("q", "k"):
        assert same_bits(found[f"{name}_out"][..., 8:], inputs[name][..., 8:])
        assert found[f"{name}_out"][..., :8].isfinite().all()
        assert not torch.equal(found[f"{name}_out"][..., :8], inputs[name][..., :8])


def test_position_0_turns_nothing() -> None:
    inputs = naive.drawn([0, 0], 4)
    found = run(inputs)
    assert same_bits(found["q_out"], inputs["q"])
    assert same_bits(found["k_out"], inputs["k"])


def test_equal_positions_turn_alike_and_others_do_not() -> None:
    inputs = naive.drawn([5, 2, 5], 6)
    inputs["q"][:], inputs["k"][:] = inputs["q"][:1, :1].clone(), inputs["q"][:1, :1].clone()
    found = run(inputs)
    assert same_bits(found["q_out"][0], found["q_out"][2])
    assert same_bits(found["q_out"][:, :2], found["k_out"])
    assert not torch.equal(found["q_out"][0, :, :8], found["q_out"][1, :, :8])


def test_halves_are_turned_and_not_neighbours() -> None:
    """GPT-J's style on the same input is something else, in every head of every token not at position 0."""
    inputs = naive.drawn([3, 1, 6], 7, dtype=torch.float32)
    found = agree(inputs)
    other = naive.rope_with_cos_sin_cache_neox_style(interleaved=True, **inputs)
    for name, tensor in other.items():
        assert ((found[name] - tensor).abs().amax(2) > 0.1).all()


def test_one_head_by_hand() -> None:
    """Pairs (1, 3) and (2, 4): the first by a quarter turn is (-3, 1), the other by (0.6, 0.8) is (-2, 4)."""
    table = torch.tensor([[math.nan] * 4, [0.0, 0.6, 1.0, 0.8], [1.0, 1.0, 0.0, 0.0]])
    q = torch.tensor([[[1.0, 2, 3, 4, 5]], [[1.0, 2, 3, 4, 5]]])
    q_out, k_out = rope(q, 2 * q, table, torch.tensor([1, 2]))
    torch.testing.assert_close(q_out, torch.tensor([[[-3.0, -2, 1, 4, 5]], [[1.0, 2, 3, 4, 5]]]))
    torch.testing.assert_close(k_out, 2 * q_out)


def test_what_is_rounded_is_the_sum_and_not_its_parts() -> None:
    """256 (1 + 2^-8) - 256 is 1, but 0 if the cosine or the product were a bfloat16."""
    q = torch.tensor([[[256.0, 256.0]]]).bfloat16()
    table = torch.tensor([[1.0 + 2.0**-8, 1.0]])
    q_out, _ = rope(q, q, table, torch.tensor([0]))
    assert q_out.tolist() == [[[1.0, 512.0]]]


def test_a_rotation_keeps_lengths_and_angles_between() -> None:
    """Scores depend on the distance of positions only."""
    inputs = naive.drawn([2, 7, 4, 9], 10, (1, 1), (8, 8), torch.float32)
    inputs["q"][:], inputs["k"][:] = inputs["q"][:1].clone(), inputs["k"][:1].clone()
    found = run(inputs)
    torch.testing.assert_close(found["q_out"].norm(dim=-1), inputs["q"].norm(dim=-1))
    scores = found["q_out"][:, 0] @ found["k_out"][:, 0].T
    torch.testing.assert_close(scores[1, 0], scores[3, 2])


def test_the_outputs_are_the_callers_own() -> None:
    inputs = naive.drawn([0, 1], 2)
    found = run(inputs)
    places = {each.data_ptr() for each in (inputs["q"], inputs["k"], *found.values())}
    assert len(places) == 4
    assert all(each.is_contiguous() for each in found.values())


@pytest.mark.parametrize("tokens", [1, 512])
def test_peak_memory_is_below_four_times_inputs_and_outputs(tokens: int) -> None:
    inputs = naive.drawn([*range(tokens)], tokens, (12, 2), (128, 64))
    data = sum(each.numel() * each.element_size() for each in (*inputs.values(), *rope(**inputs)))
    assert peak_memory.peak_bytes(lambda: rope(**inputs)) < 4 * data


def test_a_long_table_is_looked_up_and_not_copied() -> None:
    inputs = naive.drawn([0, 1], 2, (12, 2), (128, 64))
    inputs["cos_sin_cache"] = torch.cat([inputs["cos_sin_cache"], torch.full((50_000, 64), math.nan)])
    assert peak_memory.peak_bytes(lambda: rope(**inputs)) < 2**20

"""The reference of selective state updates: against loops in float64, known answers, and its cost."""

from __future__ import annotations

import importlib
import math
from typing import Any

import naive_mamba as naive
import peak_memory
import pytest
import torch
from torch import Tensor

from refgrid_references import mamba_ssu_decode

mamba = importlib.import_module("refgrid_references.mamba")

SLOTS = [
    pytest.param([0], 1, id="one sequence"),
    pytest.param([4], 6, id="one of six"),
    pytest.param([2, 0, 5, 1], 6, id="four of six"),
    pytest.param([-1], 2, id="nothing but padding"),
    pytest.param([-1, 3, -1, 0, -7], 5, id="with padding"),
    pytest.param([], 3, id="no sequence"),
    pytest.param([6, 5, 4, 3, 2, 1, 0], 7, id="all, from the last on"),
]


def run(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs by name; the inputs must be as before, bit for bit."""
    before = {name: value.clone() for name, value in inputs.items()}
    output, new_state = mamba_ssu_decode(**inputs)
    for name, value in before.items():
        assert same_bits(inputs[name], value), f"{name} was changed"
    return {"output": output, "new_state": new_state}


def same_bits(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.shape) == (other.dtype, other.shape)
    return alike and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))


def agree(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The reference gives what the loops give, to the last rounding or two of its dtype."""
    found, expected = run(inputs), naive.mamba_ssu_decode(**inputs)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (inputs["x"].dtype, tensor.shape)
        close(found[name], tensor, 1e-2 if found[name].dtype == torch.bfloat16 else 5e-6)
    return found


def close(found: Tensor, expected: Tensor, bound: float) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=bound, atol=bound, equal_nan=True)


@pytest.fixture(params=["as-is", "a row", "three rows"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own blocks, and ones so small that a batch has several: states of (4, 3, 8) have 96 numbers."""
    small = {"a row": 1, "three rows": 3 * 4 * 3 * 8 + 5}
    if request.param in small:
        monkeypatch.setattr(mamba, "block_elements", lambda _: small[request.param])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("slots", "cache"), SLOTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_reference_is_the_formula(slots: list[int], cache: int, dtype: torch.dtype) -> None:
    agree(naive.drawn(slots, cache, dtype=dtype))


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("d", [(1, 1), (1, 8), (5, 1), (7, 3)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)], ids=str)
def test_any_heads_groups_and_widths(heads: tuple[int, int], d: tuple[int, int], channels: bool) -> None:
    agree(naive.drawn([1, -1, 2], 3, heads, d, torch.float32, channels))


# ---- padding, and slots that nobody names


@pytest.mark.usefixtures("blocks")
def test_padding_gives_zero_and_changes_no_state() -> None:
    inputs = naive.drawn([-1, 2, -1, -3, 0], 4)
    inputs["state"][3] = 7.0  # where -1 would lead
    found = agree(inputs)
    assert same_bits(found["output"][[0, 2, 3]], torch.zeros(3, 4, 3, dtype=torch.bfloat16))
    assert found["output"][[1, 4]].any()
    assert same_bits(found["new_state"][[1, 3]], inputs["state"][[1, 3]])
    assert not torch.equal(found["new_state"][[0, 2]], inputs["state"][[0, 2]])


def test_padding_of_any_content_gives_zero() -> None:
    inputs = naive.drawn([-1, 1], 3)
    clean = run(inputs)
    for name in ("x", "dt", "B", "C"):
        inputs[name][0] = math.nan
    found = run(inputs)
    assert all(same_bits(found[name], clean[name]) for name in found)


@pytest.mark.usefixtures("blocks")
def test_slots_that_nobody_names_are_carried_bit_for_bit() -> None:
    inputs = naive.drawn([4, 1], 6)
    inputs["state"][3], inputs["state"][5, 0, 0, 0] = -0.0, math.inf
    inputs["state"][2].view(torch.int16)[:] = 0x7FA5  # a NaN of its own
    kept, found = [0, 2, 3, 5], run(inputs)
    assert inputs["state"][kept].isnan().any()
    assert same_bits(found["new_state"][kept], inputs["state"][kept])
    assert found["new_state"][[1, 4]].isfinite().all()


def test_without_a_sequence_the_cache_stays() -> None:
    inputs = naive.drawn([], 3)
    found = run(inputs)
    assert found["output"].shape == (0, 4, 3)
    assert same_bits(found["new_state"], inputs["state"])
    assert found["new_state"].data_ptr() != inputs["state"].data_ptr()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("name", ["state", "x", "dt", "B", "C"])
def test_a_nan_stays_in_its_sequence(name: str) -> None:
    inputs = naive.drawn([3, 0, 1], 4, dtype=torch.float32)
    clean = run(inputs)
    inputs[name][0 if name == "state" else 1] = math.nan  # sequence 1 has slot 0
    found = run(inputs)
    assert found["output"][1].isnan().all()
    assert same_bits(found["output"][[0, 2]], clean["output"][[0, 2]])
    assert same_bits(found["new_state"][[1, 3]], clean["new_state"][[1, 3]])


# ---- who reads what


@pytest.mark.parametrize("name", ["B", "C"])
def test_heads_in_a_row_share_a_group(name: str) -> None:
    inputs = naive.drawn([0], 1, (6, 3), dtype=torch.float32)
    found = run(inputs)
    inputs[name][0, 1] += 1
    changed = (run(inputs)["output"] != found["output"]).any(2)
    assert changed.tolist() == [[False, False, True, True, False, False]]


def test_rows_of_a_state_are_channels_and_columns_where_b_puts_them() -> None:
    inputs = naive.drawn([0], 1, (1, 1), (3, 4), torch.float32)
    inputs["state"].zero_()
    inputs["x"][:], inputs["B"][:] = torch.tensor([0.0, 5, 0]), torch.tensor([0.0, 0, 0, 1])
    assert run(inputs)["new_state"][0, 0].nonzero().tolist() == [[1, 3]]


def test_one_number_by_hand() -> None:
    """softplus(0.25 - 0.25) = log 2, so A = -1 halves (4, -2) to (2, -1); x log 2 = 3, so B = (1, 2) adds (3, 6).

    The state is (5, 5); C = (1, -2) reads -5, and D x = 2 adds 2.
    """
    x = 3 / math.log(2)
    output, state = mamba_ssu_decode(
        state=torch.tensor([9.0, 9, 4, -2]).view(2, 1, 1, 2),
        x=torch.tensor([[[x]]]),
        dt=torch.tensor([[[0.25]]]),
        A=torch.tensor([[[-1.0, -1.0]]]),
        B=torch.tensor([[[1.0, 2.0]]]),
        C=torch.tensor([[[1.0, -2.0]]]),
        D=torch.tensor([[2 / x]]),
        dt_bias=torch.tensor([[-0.25]]),
        state_batch_indices=torch.tensor([1], dtype=torch.int32),
    )
    close(output, torch.tensor([[[-3.0]]]), 1e-6)
    close(state, torch.tensor([9.0, 9, 5, 5]).view(2, 1, 1, 2), 1e-6)


# ---- steps as long and as short as they go


@pytest.mark.parametrize("dt", [-1e4, -88.0, -20.0, 0.0, 19.9, 20.1, 88.0, 1e4])
def test_steps_at_their_ends(dt: float) -> None:
    inputs = naive.drawn([2, 0], 3, dtype=torch.float32, channels=True)
    inputs["dt"][:] = dt
    inputs["x"] /= max(1.0, dt)  # so that what a long step adds is of the order of 1
    agree(inputs)


def test_a_step_of_nothing_leaves_the_state_and_one_beyond_all_measure_clears_it() -> None:
    inputs = naive.drawn([0, 1], 2, dtype=torch.float32)
    inputs["dt"][0], inputs["dt"][1], inputs["A"][:] = -1e4, 1e4, -1.0
    found = run(inputs)["new_state"]
    assert same_bits(found[0], inputs["state"][0])
    added = (inputs["dt"] + inputs["dt_bias"])[1, :, :, None] * inputs["x"][1, :, :, None]
    close(found[1], added * inputs["B"][1].repeat_interleave(2, 0)[:, None], 1e-5)


def test_the_output_reads_the_state_before_it_is_rounded() -> None:
    """256 + 1 is 257, which bfloat16 lacks: a cache of bfloat16 gets 256, the output 257 - 256."""
    inputs = naive.drawn([0], 1, (1, 1), (1, 2))
    inputs["state"][:], inputs["dt"][:], inputs["dt_bias"][:], inputs["A"][:] = 256.0, 32.0, 0.0, -0.0
    inputs["x"][:], inputs["B"][:], inputs["D"][:] = 1 / 32, torch.tensor([1.0, 0.0]), 0.0
    inputs["C"][:] = torch.tensor([1.0, -1.0])
    found = run(inputs)
    assert found["output"].item() == 1.0
    assert found["new_state"].flatten().tolist() == [256.0, 256.0]


# ---- cost


@pytest.mark.parametrize(("batch", "cache"), [(1, 3), (64, 64), (80, 90)])
def test_peak_memory_is_below_four_times_inputs_and_outputs(batch: int, cache: int) -> None:
    inputs = naive.drawn(list(range(batch)), cache, (8, 2), (64, 128))
    data = sum(each.numel() * each.element_size() for each in (*inputs.values(), *mamba_ssu_decode(**inputs)))
    assert peak_memory.peak_bytes(lambda: mamba_ssu_decode(**inputs)) < 4 * data


def test_a_batch_is_taken_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = naive.drawn(list(range(64)), 64, (8, 2), (64, 128))
    monkeypatch.setattr(mamba, "block_elements", lambda _: 64 * 8 * 64 * 128)
    whole = peak_memory.peak_bytes(lambda: mamba_ssu_decode(**inputs))
    monkeypatch.setattr(mamba, "block_elements", lambda _: 8 * 64 * 128)
    assert peak_memory.peak_bytes(lambda: mamba_ssu_decode(**inputs)) < whole / 2

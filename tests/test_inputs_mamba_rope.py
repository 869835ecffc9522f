"""Inputs of state updates and of rotary embeddings: slots, padding, one number a head; positions and table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import DataSet, DefinitionError, InputSpec, Workload, load_dataset
from refgrid.proving.inputs import drawing, make_inputs, mamba, rope
from refgrid_references import mamba_ssu_decode

ROOT = Path(__file__).parents[1]
MAMBA = "mamba_ssu_decode_h64_d64_s128_ng4"
ROPE = "rope_with_cos_sin_cache_neox_style_d128_rd64"
NAMES = [MAMBA, MAMBA.replace("h64_d64_s128_ng4", "h128_d64_s128_ng8"), ROPE]
PER_HEAD = {"A": 1, "D": 1, "dt_bias": 1, "dt": 2}  # how many dimensions have numbers of their own


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


@pytest.fixture(autouse=True)
def _no_weights_kept() -> Iterator[None]:
    drawing._kept.clear()
    yield
    drawing._kept.clear()


def make(dataset: DataSet, name: str, uuid: str = "w", seed: int = 0, **axes: int) -> dict[str, Any]:
    definition = dataset.definitions[name]
    given = {each: InputSpec("random") for each in definition.inputs}
    return dict(make_inputs(definition, Workload(uuid, axes, given), seed, "cpu", ROOT).tensors)


def ssu(dataset: DataSet, uuid: str = "w", batch: int = 3, cache: int = 5, seed: int = 0) -> dict[str, Any]:
    return make(dataset, MAMBA, uuid, seed, batch_size=batch, state_cache_size=cache)


def rotary(dataset: DataSet, tokens: int, most: int, uuid: str = "w", seed: int = 0) -> dict[str, Any]:
    axes = {"num_tokens": tokens, "num_qo_heads": 3, "num_kv_heads": 2, "max_seq_len": most}
    return make(dataset, ROPE, uuid, seed, **axes)


@pytest.mark.parametrize("name", NAMES)
def test_a_laptop_proves_at_least_four_workloads(dataset: DataSet, name: str) -> None:
    sizes = [size_of(dataset.definitions[name], workload) for workload in dataset.workloads[name]]
    assert sizes.count("small") >= 4
    assert sum(not w.uuid.startswith("edge") for w in dataset.workloads[name]) >= 2


@pytest.mark.parametrize("uuid", ["w", "pad", "channels"])
def test_equal_seeds_give_equal_bits_and_others_do_not(dataset: DataSet, uuid: str) -> None:
    kinds: list[Callable[[int], dict[str, Any]]] = [
        lambda seed: ssu(dataset, uuid, seed=seed),
        lambda seed: rotary(dataset, 9, 20, uuid, seed),
    ]
    for kind in kinds:
        first = kind(7)
        drawing._kept.clear()
        again, other = kind(7), kind(8)
        for name, value in first.items():
            assert torch.equal(value.flatten().view(torch.uint8), again[name].flatten().view(torch.uint8)), name
        assert not torch.equal(first["x" if "x" in first else "q"], other["x" if "x" in other else "q"])


# ---- selective state updates


@pytest.mark.parametrize(("batch", "cache"), [(1, 1), (2, 2), (3, 5), (17, 23), (16, 16)])
@pytest.mark.parametrize("uuid", ["w", "channels", "pad", "edge_pad_channels"])
def test_slots_are_distinct_and_only_with_pad_is_some_padding(
    dataset: DataSet, uuid: str, batch: int, cache: int
) -> None:
    slots = ssu(dataset, uuid, batch, cache)["state_batch_indices"]
    named = slots[slots >= 0].tolist()
    padding = [row for row, slot in enumerate(slots.tolist()) if slot < 0]
    assert (slots.dtype, len(slots)) == (torch.int32, batch)
    assert len(named) == len(set(named))
    assert max(named, default=0) < cache
    assert padding == (list(range(0, batch, 3)) if "pad" in uuid else [])
    assert slots.min() >= -1


def test_slots_are_in_no_order(dataset: DataSet) -> None:
    slots = ssu(dataset, batch=16, cache=20)["state_batch_indices"]
    assert not torch.equal(slots, slots.sort().values)


def test_a_batch_beyond_the_cache_is_refused(dataset: DataSet) -> None:
    with pytest.raises(DefinitionError, match="'state_cache_size >= batch_size' does not hold"):
        ssu(dataset, batch=3, cache=2)
    free = replace(dataset.definitions[MAMBA], constraints=())
    given = {each: InputSpec("random") for each in free.inputs}
    with pytest.raises(DefinitionError, match="names 3 slots, but the cache has 2"):
        make_inputs(free, Workload("w", {"batch_size": 3, "state_cache_size": 2}, given), 0, "cpu", ROOT)


@pytest.mark.parametrize("uuid", ["w", "pad"])
def test_states_are_normal_in_named_slots_and_nan_in_others(dataset: DataSet, uuid: str) -> None:
    made = ssu(dataset, uuid, 3, 5)
    named = [slot for slot in made["state_batch_indices"].tolist() if slot >= 0]
    others = [slot for slot in range(5) if slot not in named]
    assert len(named) == (3 if uuid == "w" else 2)
    assert made["state"][named].isfinite().all()
    assert 0.98 < made["state"][named].double().std() < 1.02
    assert made["state"][others].isnan().all()
    assert not torch.equal(made["state"][named[0]], made["state"][named[1]])


@pytest.mark.parametrize("name", PER_HEAD)
def test_numbers_are_equal_within_a_head_and_with_channels_they_are_not(dataset: DataSet, name: str) -> None:
    one, many = ssu(dataset)[name], ssu(dataset, "edge_channels")[name]
    lead = PER_HEAD[name]
    flat = one.flatten(lead)
    assert (flat == flat[..., :1]).all()
    assert len(flat[..., 0].unique()) > 16
    assert (many.flatten(lead) != many.flatten(lead)[..., :1]).any(-1).all()
    assert one.is_contiguous()
    assert many.is_contiguous()


@pytest.mark.parametrize("uuid", ["w", "edge_channels"])
def test_rates_are_negative_and_reach_from_end_to_end(dataset: DataSet, uuid: str) -> None:
    rates, biases = (ssu(dataset, uuid)[name].double() for name in ("A", "dt_bias"))
    assert (rates < 0).all()
    assert (-rates.max().item(), -rates.min().item()) == pytest.approx(mamba.RATES)
    assert (biases.min().item(), biases.max().item()) == mamba.BIASES
    assert (biases * 64 == (biases * 64).round()).all()
    if uuid == "w":
        assert len(rates.unique()) == len(biases.unique()) == 64
        assert not torch.equal(rates, rates.sort(0).values)


def test_steps_hold_all_clear_all_and_lie_between(dataset: DataSet) -> None:
    made = ssu(dataset, batch=32, cache=32)
    own = made["dt"][..., 0].double()
    for extreme in (mamba.CLEARS, -mamba.CLEARS):
        assert 0.25 / mamba.EXTREME < (own == extreme).double().mean() < 4 / mamba.EXTREME
    assert 0.9 < own[own.abs() < 10].std() < 1.1
    step = torch.nn.functional.softplus(own + made["dt_bias"][:, 0].double())
    decay = torch.exp(step * made["A"][:, 0, 0].double())
    assert (decay > 1 - 1e-9).any()
    assert (decay < 1e-30).any()
    assert ((decay > 0.1) & (decay < 0.9)).double().mean() > 0.1


def test_outputs_are_of_the_order_of_one(dataset: DataSet) -> None:
    made = ssu(dataset, batch=16, cache=16)
    assert 0.11 < made["B"].double().std() < 0.14
    assert 0.08 < made["C"].double().std() < 0.1
    for tensor in mamba_ssu_decode(**made):
        assert 0.3 < tensor.double().std() < 3


# ---- rotary embeddings


@pytest.mark.parametrize(("tokens", "most"), [(1, 1), (1, 9), (2, 7), (13, 2), (129, 131), (5, 196608)])
def test_positions_are_in_range_and_the_last_and_the_first_are_among_them(
    dataset: DataSet, tokens: int, most: int
) -> None:
    positions = rotary(dataset, tokens, most)["positions"]
    assert (positions.dtype, len(positions)) == (torch.int64, tokens)
    assert positions.min() >= 0
    assert positions[0] == positions.max() == most - 1
    assert tokens == 1 or positions[1] == 0
    assert tokens < 5 or positions[4] == most - 1


def test_positions_are_unsorted_and_repeated(dataset: DataSet) -> None:
    positions = rotary(dataset, 129, 131)["positions"]
    assert not torch.equal(positions, positions.sort().values)
    assert 50 < len(positions.unique()) < 129


def test_a_token_without_a_position_is_refused(dataset: DataSet) -> None:
    free = replace(dataset.definitions[ROPE], constraints=())
    axes = {"num_tokens": 1, "num_qo_heads": 1, "num_kv_heads": 1, "max_seq_len": 0}
    given = {each: InputSpec("random") for each in free.inputs}
    with pytest.raises(DefinitionError, match=r"has 1 entries, but max_seq_len is 0"):
        make_inputs(free, Workload("w", axes, given), 0, "cpu", ROOT)


@pytest.mark.parametrize(("tokens", "most"), [(13, 2), (129, 131), (40, 196608)])
def test_the_table_holds_cosines_and_sines_and_nan_where_nobody_looks(dataset: DataSet, tokens: int, most: int) -> None:
    made = rotary(dataset, tokens, most)
    table, used = made["cos_sin_cache"], made["positions"].unique()
    unused = torch.ones(most, dtype=torch.bool)
    unused[used] = False
    assert (table.dtype, table.shape) == (torch.float32, (most, 64))
    assert table[unused].isnan().all()
    for position in used.tolist():
        for i, (cos, sin) in enumerate(zip(*table[position].double().split(32), strict=True)):
            turns = math.atan2(sin, cos) / (2 * math.pi) * rope.ANGLES
            angle = 2 * math.pi * round(turns) / rope.ANGLES
            assert (float(cos), float(sin)) == pytest.approx((math.cos(angle), math.sin(angle)), abs=1e-6)
            exact = position * rope.BASE ** (-i / 32)
            apart = math.remainder(angle - exact, 2 * math.pi)
            assert abs(apart) < 2 * math.pi * (1 / rope.ANGLES + position / rope.TURN) + 1e-9


def test_position_0_is_no_rotation_and_others_are(dataset: DataSet) -> None:
    table = rotary(dataset, 13, 2)["cos_sin_cache"]
    assert table[0].tolist() == [1.0] * 32 + [0.0] * 32
    assert table[1, 0].item() == pytest.approx(math.cos(1), abs=1e-4)
    assert table[1, 32].item() == pytest.approx(math.sin(1), abs=1e-4)

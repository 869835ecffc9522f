"""Inputs of the gated delta rule: unit keys, gates of every strength, ragged sequences, slots of a pool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import DataSet, DefinitionError, InputSpec, Workload, load_dataset
from refgrid.proving.inputs import drawing, gdn, make_inputs

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "definitions" / "gdn").glob("*.json"))
PREFILL, MTP, DECODE = (f"gdn_{kind}_qk4_v8_d128_k_last" for kind in ("prefill", "mtp", "decode"))


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


@pytest.fixture(autouse=True)
def _no_weights_kept() -> Iterator[None]:
    drawing._kept.clear()
    yield
    drawing._kept.clear()


def make(dataset: DataSet, name: str, uuid: str = "w", **axes: int) -> dict[str, Any]:
    definition = dataset.definitions[name]
    given = {each: InputSpec("random") for each in definition.inputs} | {"scale": InputSpec("scalar", 0.0)}
    if "cu_seqlens" in given:
        axes["len_cu_seqlens"] = axes["num_seqs"] + 1
    return dict(make_inputs(definition, Workload(uuid, axes, given), 0, "cpu", ROOT).tensors)


def test_there_are_nine() -> None:
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_a_laptop_proves_at_least_four_workloads_and_both_ways_to_say_the_scale(dataset: DataSet, name: str) -> None:
    definition = dataset.definitions[name]
    small = [w for w in dataset.workloads[name] if size_of(definition, w) == "small"]
    assert len(small) >= 4
    assert {w.inputs["scale"].value for w in small} == {0.0, 128**-0.5}
    assert sum(not w.uuid.startswith("edge") for w in dataset.workloads[name]) >= 2


def test_keys_are_of_length_one_and_nothing_else_is(dataset: DataSet) -> None:
    made = make(dataset, PREFILL, total_seq_len=500, num_seqs=2)
    assert (made["k"].double().norm(dim=-1) - 1).abs().max() < 2e-3  # each number is rounded to a bfloat16
    assert 10 < made["q"].double().norm(dim=-1).mean() < 12.5


def test_keys_that_were_once_drawn(dataset: DataSet) -> None:
    made = make(dataset, DECODE, batch_size=1)
    assert made["k"][0, 0, 0, :4].tolist() == [-0.1904296875, 0.00689697265625, 0.1787109375, -0.061767578125]
    assert made["A_log"].tolist() == [-0.6875, 2.75, 1.28125, 1.78125, -0.1875, 0.78125, 0.28125, 2.25]


@pytest.mark.parametrize("name", [DECODE, DECODE.replace("qk4_v8", "qk16_v32")])
def test_rates_and_biases_reach_from_end_to_end_and_belong_to_the_definition(dataset: DataSet, name: str) -> None:
    one, other = (make(dataset, name, uuid, batch_size=2) for uuid in ("w", "v"))
    for parameter, low, high in (("A_log", -22 / 32, 88 / 32), ("dt_bias", -8.0, 2.0)):
        assert torch.equal(one[parameter], other[parameter])
        assert (one[parameter].min(), one[parameter].max()) == (low, high)
        assert len(one[parameter].unique()) == len(one[parameter])
        assert not torch.equal(one[parameter], one[parameter].sort().values)
    assert not torch.equal(one["a"], other["a"])


def test_gates_from_none_to_all(dataset: DataSet) -> None:
    made = make(dataset, PREFILL, total_seq_len=4000, num_seqs=3)
    log_g = -made["A_log"].exp() * torch.nn.functional.softplus(made["a"].float() + made["dt_bias"])
    g, beta = log_g.double().exp(), made["b"].double().sigmoid()
    assert (g < 1e-40).any(), "a token clears the state"
    assert (g == 1).any() or (g > 1 - 1e-12).any(), "a token keeps all of it"
    assert ((g > 0.9).double().mean() > 0.2) & ((g < 0.1).double().mean() > 0.1)
    assert (log_g.double().median(0).values * 64 > -1).sum() >= 1, "some head remembers more than a chunk"
    assert (beta < 1e-30).any()
    assert (beta > 1 - 1e-12).any()
    assert 0.01 < (made["a"] == 32).double().mean() * 2 + (made["a"] == -32).double().mean() * 2 < 0.06


@pytest.mark.parametrize(("total", "count"), [(1, 1), (1, 3), (0, 2), (257, 5), (1021, 13), (8192, 4), (3, 40)])
def test_sequences_share_out_all_tokens(dataset: DataSet, total: int, count: int) -> None:
    ends = make(dataset, PREFILL, total_seq_len=total, num_seqs=count)["cu_seqlens"]
    lengths = ends.diff()
    assert (ends.dtype, int(ends[0]), int(ends[-1]), len(lengths)) == (torch.int64, 0, total, count)
    assert (lengths >= 0).all()


def test_lengths_around_a_chunk_and_none_are_among_them(dataset: DataSet) -> None:
    lengths = make(dataset, PREFILL, total_seq_len=1021, num_seqs=13)["cu_seqlens"].diff().tolist()
    assert set(gdn.LENGTHS) <= set(lengths)
    assert lengths[: len(gdn.LENGTHS)] != list(gdn.LENGTHS)


@pytest.mark.parametrize(("batch", "pool", "padding"), [(1, 1, 0), (3, 3, 1), (17, 17, 4), (3, 5, 0), (16, 32, 0)])
def test_slots_are_distinct_and_a_full_pool_has_padding(dataset: DataSet, batch: int, pool: int, padding: int) -> None:
    slots = make(dataset, MTP, batch_size=batch, seq_len=2, pool_size=pool)["initial_state_indices"]
    named = slots[slots >= 0].tolist()
    assert slots.dtype == torch.int32
    assert len(named) == len(set(named)) == batch - padding
    assert all(slot < pool for slot in named)


def test_slots_are_in_no_order(dataset: DataSet) -> None:
    slots = make(dataset, MTP, batch_size=16, seq_len=2, pool_size=32)["initial_state_indices"]
    assert not torch.equal(slots, slots.sort().values)


def test_a_batch_beyond_the_pool_is_refused(dataset: DataSet) -> None:
    with pytest.raises(DefinitionError, match=r"'pool_size >= batch_size' does not hold"):
        make(dataset, MTP, batch_size=3, seq_len=2, pool_size=2)


def test_a_batch_beyond_the_pool_is_refused_without_a_constraint_too(dataset: DataSet) -> None:
    free = replace(dataset.definitions[MTP], constraints=())
    given = {each: InputSpec("random") for each in free.inputs} | {"scale": InputSpec("scalar", 0.0)}
    workload = Workload("w", {"batch_size": 3, "seq_len": 2, "pool_size": 2}, given)
    with pytest.raises(DefinitionError, match="names 3 slots, but the pool has 2"):
        make_inputs(free, workload, 0, "cpu", ROOT)


def test_one_draft_token_is_refused(dataset: DataSet) -> None:
    with pytest.raises(DefinitionError, match=r"'seq_len > 1' does not hold"):
        make(dataset, MTP, batch_size=1, seq_len=1, pool_size=2)


def test_the_buffer_holds_nan_and_the_pool_does_not(dataset: DataSet) -> None:
    made = make(dataset, MTP, batch_size=1, seq_len=2, pool_size=3)
    assert made["intermediate_states_buffer"].isnan().all()
    assert made["initial_state"].isfinite().all()
    assert 0.9 < made["initial_state"].std() < 1.1

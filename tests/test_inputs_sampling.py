"""Inputs of sampling: whole weights, cuts that no rounding moves, and ties only where a workload asks for them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.dataset.definition import Definition, DefinitionError, InputSpec, Workload, load_dataset
from refgrid.proving.inputs import make_inputs
from refgrid.proving.inputs import sampling as module
from refgrid.proving.inputs.sampling import Row, inside, rows_of

DATASET = load_dataset(Path(__file__).parents[1])
FEW = 1024  # tokens of the definitions that are drawn often, by one row alone, whose draws test_draws_power.py counts
VOCABULARIES = [
    definition
    for definition in DATASET.definitions.values()
    if definition.op_type == "sampling" and definition.axes["vocab_size"].value != FEW
]
VOCAB_SIZES = sorted({definition.axes["vocab_size"].value or 0 for definition in VOCABULARIES})
UUIDS = ("b16", "edge_ties", "edge_argmax")
PROFILES = (module.halves, module.steps, module.gaps, module.zipf, module.one_hot, module.tied, module.flat)


def make(kind: str, uuid: str, batch_size: int, seed: int = 0) -> dict[str, Any]:
    definition = DATASET.definitions[f"{kind}_sampling_from_probs_v128256"]
    specs = {name: InputSpec("random") for name in definition.inputs}
    return make_inputs(definition, Workload(uuid, {"batch_size": batch_size}, specs), seed, "cpu", None).tensors


def classes(row: Row, vocab_size: int, *, filtered: bool) -> list[tuple[Fraction, Fraction, int]]:
    """Every group of tied tokens from the most probable down: mass before it and with it, and how many tie."""
    weights = row.weights(vocab_size)
    if filtered and 0 < row.top_k <= vocab_size:
        weights = weights[weights >= weights[row.top_k - 1]]
    total, mass, found = int(weights.sum()), 0, []
    values, counts = weights.unique(return_counts=True)
    for value, count in zip(values.flip(0).tolist(), counts.flip(0).tolist(), strict=True):
        found.append((Fraction(mass, total), Fraction(mass + value * count, total), count))
        mass += value * count
    return found


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.__name__)
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 150, *VOCAB_SIZES])
def test_weights_fall_and_keep_their_differences_as_float32(profile: Any, vocab_size: int) -> None:
    weights = profile(vocab_size)
    probs = (weights.double() / int(weights.sum())).float()

    assert weights.shape == (vocab_size,)
    assert (weights.diff() <= 0).all()
    assert weights[-1] >= 0
    assert weights[0] > 0
    assert torch.equal(probs.diff() == 0, weights.diff() == 0)
    assert abs(probs.double().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("uuid", UUIDS)
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("vocab_size", [VOCAB_SIZES[0], VOCAB_SIZES[-1]])
def test_a_cut_lies_well_within_the_mass_that_reaches_top_p(uuid: str, filtered: bool, vocab_size: int) -> None:
    for row in rows_of(uuid, vocab_size):
        top_p = inside(row, vocab_size, filtered=filtered)
        if not 0 < row.top_p < 1:
            assert top_p == row.top_p
            continue
        low, high, _ = next(
            group for group in classes(row, vocab_size, filtered=filtered) if group[1] >= Fraction(top_p)
        )
        exact = Fraction(float(torch.tensor(top_p)))
        assert high - exact > Fraction(1, 2000), row
        assert low == 0 or exact - low > Fraction(1, 2000), row


@pytest.mark.parametrize("filtered", [False, True])
def test_only_workloads_named_ties_cut_through_tied_tokens(filtered: bool) -> None:
    vocab_size = VOCAB_SIZES[0]
    through = dict.fromkeys(UUIDS, 0)
    for uuid in UUIDS:
        for row in rows_of(uuid, vocab_size):
            weights = row.weights(vocab_size)
            if 0 < row.top_k < vocab_size and weights[row.top_k - 1]:
                through[uuid] += bool(weights[row.top_k - 1] == weights[row.top_k])
            if 0 < row.top_p < 1:
                top_p = Fraction(inside(row, vocab_size, filtered=filtered))
                groups = classes(row, vocab_size, filtered=filtered)
                through[uuid] += next(count for _, high, count in groups if high >= top_p) > 1

    assert through["b16"] == through["edge_argmax"] == 0
    assert through["edge_ties"] >= 6


def test_filters_are_of_every_kind() -> None:
    vocab_size = VOCAB_SIZES[0]
    rows = rows_of("b16", vocab_size)

    assert {-1, 0, 1, 2, 50, vocab_size, vocab_size + 5} <= {row.top_k for row in rows}
    assert {1e-6, 0.5, 0.9, 1.0, 2.0} <= {row.top_p for row in rows}
    assert all(row.top_p > 0 for uuid in ("b16", "edge_ties") for row in rows_of(uuid, vocab_size))
    assert {row.top_p for row in rows_of("edge_argmax", vocab_size)} == {0}
    assert sum(row.weights is module.zipf for row in rows) == 3


@pytest.mark.parametrize("kind", ["top_k", "top_p", "top_k_top_p"])
@pytest.mark.parametrize("uuid", UUIDS)
def test_a_batch_goes_through_the_rows_in_orders_of_their_own(kind: str, uuid: str) -> None:
    made = make(kind, uuid, 13)
    rows = rows_of(uuid, 128256)

    for i, probs in enumerate(made["probs"]):
        row = rows[(13 + i) % len(rows)]
        weights = row.weights(128256)
        assert torch.equal(probs.sort(descending=True).values, (weights.double() / int(weights.sum())).float())
        assert "top_k" not in made or int(made["top_k"][i]) == row.top_k
        assert probs.unique().numel() == 1 or not torch.equal(probs, probs.sort(descending=True).values)
    dtypes = {"probs": torch.float32, "top_k": torch.int32, "top_p": torch.float32}
    assert all(tensor.dtype == dtypes[name] for name, tensor in made.items())


def test_the_seed_moves_the_tokens_and_not_the_filters() -> None:
    one, same, other = (
        make("top_k_top_p", "b16", 5),
        make("top_k_top_p", "b16", 5),
        make("top_k_top_p", "b16", 5, seed=1),
    )

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["probs"], other["probs"])
    assert torch.equal(one["top_k"], other["top_k"])
    assert torch.equal(one["top_p"], other["top_p"])


@pytest.mark.parametrize("definition", VOCABULARIES, ids=lambda definition: definition.name)
def test_every_definition_has_small_workloads_of_every_kind(definition: Definition) -> None:
    uuids = [workload.uuid for workload in DATASET.workloads[definition.name]]
    small = [w.uuid for w in DATASET.workloads[definition.name] if w.axes["batch_size"] <= 8]

    assert len(small) >= 4
    assert any("ties" in uuid for uuid in small)
    assert any("argmax" in uuid for uuid in small) == ("top_p" in definition.inputs)
    assert any(w.axes["batch_size"] >= 64 for w in DATASET.workloads[definition.name])
    assert len(set(uuids)) == len(uuids)


def test_a_filter_without_probs_is_told() -> None:
    whole = DATASET.definitions["top_k_sampling_from_probs_v128256"]
    inputs = {"top_k": whole.inputs["top_k"]}
    lacking = Definition("x", "sampling", whole.axes, inputs, whole.outputs, "")

    with pytest.raises(DefinitionError, match="is made from probs, which the definition does not have"):
        make_inputs(lacking, Workload("w", {"batch_size": 2}, {"top_k": InputSpec("random")}), 0, "cpu", None)

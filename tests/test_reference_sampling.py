"""Sampling references against the definition on exact fractions, and against answers known beforehand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import naive_sampling as naive
import pytest
import torch
from peak_memory import peak_bytes

from refgrid.dataset.definition import InputSpec, Workload, load_dataset
from refgrid.dataset.reference import compile_reference
from refgrid.proving.draws import compare_draws
from refgrid.proving.inputs import make_inputs
from refgrid.proving.tolerance import EXACT
from refgrid_references import (
    sampling,
    top_k_sampling_from_probs,
    top_k_top_p_sampling_from_probs,
    top_p_sampling_from_probs,
)

Tensor: TypeAlias = torch.Tensor
DATASET = load_dataset(Path(__file__).parents[1])

# Values of exact sums, with ties and zeros.
ROWS = torch.tensor(
    [
        [0.5, 0.25, 0.125, 0.0625, 0.0625, 0, 0],
        [0.0625, 0.25, 0.25, 0.25, 0.125, 0.0625, 0],
        [0, 0, 1, 0, 0, 0, 0],
        [0.125, 0.125, 0.125, 0.125, 0.125, 0.125, 0.25],
        [0, 0.5, 0, 0.5, 0, 0, 0],
        [2.0**-149, 2.0**-126, 2.0**-24, 1 - 2.0**-24, 0, 0, 0],
    ]
)
TOP_K = [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 12]
TOP_P = [-1.0, 0.0, 1e-30, 1e-6, 0.2, 0.25, 0.3, 0.5, 0.6, 0.75, 0.9, 0.9375, 1 - 2.0**-23, 1.0, 2.0]


def support(call: Callable[[], Tensor], times: int, width: int) -> Tensor:
    """Which tokens are ever drawn, [rows, width]."""
    seen = torch.stack([torch.nn.functional.one_hot(call(), width) for _ in range(times)])
    return seen.sum(dim=0) > 0


def kept_by_reference(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Which tokens have mass when the row is drawn from."""
    seen: list[Tensor] = []

    def look(mass: Tensor, u: Tensor) -> Tensor:
        seen.append(mass > 0)
        return u[:, 0].long()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "draw", look)
        sampling.sample(probs, top_k, top_p)
    return torch.cat(seen)


@pytest.mark.parametrize("top_k", TOP_K)
def test_top_k_keeps_what_the_definition_keeps(top_k: int) -> None:
    k = torch.full((len(ROWS),), top_k, dtype=torch.int32)

    assert torch.equal(kept_by_reference(ROWS, k, None), naive.law(ROWS, k, None) > 0)


@pytest.mark.parametrize("top_p", TOP_P)
@pytest.mark.parametrize("top_k", [None, 0, 1, 3, 4])
def test_top_p_keeps_what_the_definition_keeps(top_p: float, top_k: int | None) -> None:
    k = None if top_k is None else torch.full((len(ROWS),), top_k, dtype=torch.int32)
    p = torch.full((len(ROWS),), top_p)

    assert torch.equal(kept_by_reference(ROWS, k, p), naive.law(ROWS, k, p) > 0)


@pytest.mark.parametrize("seed", range(8))
def test_odd_rows_are_filtered_as_the_definition_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, width = (1, 7, 13, 5)[seed % 4], (1, 2, 129, 1025, 37)[seed % 5]
    weights = torch.randint(0, (3, 9, 1000, 10**6)[seed % 4], (rows, width), generator=generator)
    weights[:, seed % width] += 1
    probs = (weights.double() / weights.sum(dim=1, keepdim=True)).float()
    k = torch.randint(-1, width + 3, (rows,), generator=generator, dtype=torch.int32)
    p = torch.rand(rows, generator=generator)

    assert torch.equal(kept_by_reference(probs, k, p), naive.law(probs, k, p) > 0)
    assert torch.equal(kept_by_reference(probs, None, p), naive.law(probs, None, p) > 0)


@pytest.mark.parametrize("top_k", [0, 1, 3, 6])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.6, 1.0])
def test_draws_follow_the_law(top_k: int, top_p: float) -> None:
    times = 1000
    probs = ROWS.repeat(times, 1)
    k, p = torch.full((len(probs),), top_k, dtype=torch.int32), torch.full((len(probs),), top_p)
    few = slice(0, len(ROWS))

    torch.manual_seed(top_k)
    for name, samples, law in (
        ("k", top_k_sampling_from_probs(probs, k), naive.law(ROWS, k[few], None)),
        ("p", top_p_sampling_from_probs(probs, p), naive.law(ROWS, None, p[few])),
        ("both", top_k_top_p_sampling_from_probs(probs, k, p), naive.law(ROWS, k[few], p[few])),
    ):
        found = compare_draws(name, samples.view(times, len(ROWS)), law, EXACT)

        assert found.matches, found.describe()


def test_answers_known_beforehand() -> None:
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def one(k: int, p: float) -> list[int]:
        drawn = support(
            lambda: top_k_top_p_sampling_from_probs(probs, torch.tensor([k], dtype=torch.int32), torch.tensor([p])),
            60,
            4,
        )
        return [token for token, seen in enumerate(drawn[0].tolist()) if seen]

    torch.manual_seed(0)
    assert one(1, 1.0) == [1]
    assert one(2, 0.55) == [1]  # 4 of 7 parts reach 0.55, though 0.4 does not
    assert one(2, 0.6) == [1, 3]
    assert one(0, 0.55) == [1, 3]
    assert one(0, 0.75) == [1, 2, 3]
    assert one(3, 1.0) == [1, 2, 3]
    assert one(9, 1.0) == [0, 1, 2, 3]
    assert one(0, 0.0) == [1]


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
def test_a_token_of_no_mass_is_never_drawn(u: float) -> None:
    p = torch.tensor([[0, 0, 0.5, 0, 0.25, 0, 0], [0, 0, 0, 0, 0, 0, 0.7], [2.0**-149, 0, 0, 0, 0, 0, 0]]).double()

    samples = sampling.draw(p.clone(), torch.full((3, 1), u, dtype=torch.float64))

    assert (p.gather(1, samples[:, None]) > 0).all()
    assert samples.tolist() == [{0.0: 2, 0.5: 2}.get(u, 4), 6, 0]


def test_rare_tokens_of_a_wide_row_are_as_likely_as_they_should_be() -> None:
    """In float32 the running mass at the end of such a row has steps wider than a token."""
    width, times = 262208, 64
    probs = torch.full((1, width), 1 / width)
    torch.manual_seed(0)
    samples = torch.cat([top_p_sampling_from_probs(probs.repeat(times, 1), torch.ones(times)) for _ in range(4)])
    eighths = (samples * 8 // width).bincount(minlength=8)[None]

    assert compare_draws(
        "eighth", torch.arange(8).repeat_interleave(eighths[0])[:, None], torch.full((1, 8), 0.125), EXACT
    ).matches
    u = torch.tensor([[(width - 1.5) / width]], dtype=torch.float64)
    assert sampling.draw(probs.double(), u).tolist() == [width - 2]


def test_the_nucleus_of_a_wide_row_is_cut_where_it_should_be() -> None:
    """A float32 sum of these weights would cut hundreds of tokens away from there."""
    width = 262208
    weights = torch.arange(2 * width, width, -1)
    probs = (weights.double() / int(weights.sum())).float()[None]
    reached = probs.double().cumsum(dim=1)[0]

    for at in (1, 1000, 100_000, 262_000):
        middle = (reached[at] - probs[0, at].double() / 2) / reached[-1]
        # the last bit of a float32 top_p is worth a few hundredths of a token here
        kept = (probs >= sampling.top_p_threshold(probs, probs.double(), middle.float()[None, None])).sum()

        assert kept == at + 1


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probs, k, p = ROWS.repeat(50, 1), torch.arange(300, dtype=torch.int32) % 9, torch.linspace(0, 1, 300)
    drawn = []
    for elements in (1, 5000, 2**21):
        monkeypatch.setattr(sampling, "block_elements", lambda _, elements=elements: elements)
        torch.manual_seed(7)
        drawn.append(top_k_top_p_sampling_from_probs(probs, k, p))

    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[1], drawn[2])


def test_the_seed_decides_and_inputs_are_left_alone() -> None:
    probs, k, p = ROWS.repeat(20, 1), torch.full((120,), 4, dtype=torch.int32), torch.full((120,), 0.9)
    before = [tensor.clone() for tensor in (probs, k, p)]

    def sample(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return top_k_top_p_sampling_from_probs(probs, k, p)

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert sample(1).dtype == torch.int64
    assert all(torch.equal(*pair) for pair in zip(before, (probs, k, p), strict=True))


def test_rows_do_not_share_a_number() -> None:
    torch.manual_seed(0)

    assert top_p_sampling_from_probs(torch.full((50, 1000), 1e-3), torch.ones(50)).unique().numel() > 40


def test_no_row_gives_no_sample() -> None:
    samples = top_k_top_p_sampling_from_probs(torch.empty(0, 5), torch.empty(0, dtype=torch.int32), torch.empty(0))

    assert (samples.shape, samples.dtype) == ((0,), torch.int64)


def test_a_negative_zero_is_a_zero() -> None:
    probs = torch.tensor([[-0.0, 0.5, 0.5, -0.0]])
    k = torch.tensor([3], dtype=torch.int32)

    assert support(lambda: top_k_sampling_from_probs(probs, k), 60, 4).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("batch_size", [1, 16, 64])
@pytest.mark.parametrize("kind", ["top_k", "top_p", "top_k_top_p"])
def test_memory_stays_below_four_times_inputs_and_outputs(kind: str, batch_size: int) -> None:
    definition = DATASET.definitions[f"{kind}_sampling_from_probs_v128256"]
    workload = Workload("peak", {"batch_size": batch_size}, {name: InputSpec("random") for name in definition.inputs})
    inputs = make_inputs(definition, workload, 0, "cpu", None).tensors
    run = compile_reference(definition)
    held = sum(value.nbytes for value in inputs.values() if isinstance(value, torch.Tensor))

    assert math.prod(inputs["probs"].shape) * 4 < held  # type: ignore[union-attr]
    assert peak_bytes(lambda: run(*inputs.values())) < 4 * (held + 8 * batch_size)

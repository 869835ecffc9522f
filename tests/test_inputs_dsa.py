"""Inputs of sparse attention and of its indexer: what is read holds numbers, everything else would be noticed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import naive_dsa as naive
import pytest
import torch

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import DataSet, InputSpec, Workload, load_dataset
from refgrid.proving.inputs import Inputs, make_inputs

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "definitions/dsa_paged").glob("*.json"))
ATTENTION, INDEXER = NAMES[:2], NAMES[2]


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


def make(dataset: DataSet, name: str, uuid: str = "w", seed: int = 0, **axes: int) -> Inputs:
    definition = dataset.definitions[name]
    specs = {key: InputSpec("random") for key in definition.inputs}
    specs |= {"sm_scale": InputSpec("scalar", 0.1)} if "sm_scale" in specs else {}
    return make_inputs(definition, Workload(uuid, axes, specs), seed, "cpu", ROOT)


def tensors(dataset: DataSet, name: str, **axes: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in make(dataset, name, **axes).tensors.items() if isinstance(value, torch.Tensor)}


def small(dataset: DataSet, name: str) -> dict[str, dict[str, Any]]:
    """Every small workload of a definition, made."""
    definition = dataset.definitions[name]
    chosen = [w for w in dataset.workloads[name] if size_of(definition, w) == "small"]
    return {w.uuid: dict(make_inputs(definition, w, 0, "cpu", ROOT).tensors) for w in chosen}


def lengths(indices: torch.Tensor) -> list[int]:
    return [int(count) for count in (indices >= 0).sum(dim=1)]


# ---- attention


@pytest.mark.parametrize("name", ATTENTION)
def test_tokens_name_slots_once_and_caches_hold_numbers_there_alone(dataset: DataSet, name: str) -> None:
    for uuid, inputs in small(dataset, name).items():
        indices, slots = inputs["sparse_indices"], inputs["ckv_cache"].shape[0] * inputs["ckv_cache"].shape[1]
        assert -1 <= int(indices.min()) <= int(indices.max()) < slots, uuid
        for row in indices:
            named = row[row >= 0]
            assert len(named) == len(named.unique()), uuid
        read = torch.zeros(slots, dtype=torch.bool)
        read[indices[indices >= 0].long()] = True
        for cache in ("ckv_cache", "kpe_cache"):
            flat = inputs[cache].flatten(0, 1)
            assert flat[read].isfinite().all(), (uuid, cache)
            assert flat[~read].isnan().all(), (uuid, cache)


@pytest.mark.parametrize("name", ATTENTION)
def test_rows_of_every_kind_are_there(dataset: DataSet, name: str) -> None:
    page_size = dataset.definitions[name].axes["page_size"].value or 1
    inputs = tensors(dataset, name, num_tokens=9, num_pages=2560 // page_size)
    indices, counts = inputs["sparse_indices"], lengths(inputs["sparse_indices"])
    assert counts[0] == 2048
    assert counts[2] == 0
    assert 1 <= counts[1] <= 63
    assert {0, 2559} <= set(indices[0].tolist()), "the first and the last slot are read"
    assert int(inputs["ckv_cache"].flatten(0, 1).isnan().all(1).sum()) >= 2560 // 8
    behind, among = indices[4, : counts[4]], indices[1, : counts[1]]
    assert (behind >= 0).all()
    assert 0 < counts[4] < 2048, "-1 behind the last key"
    assert (among < 0).any(), "-1 among the keys"
    assert not torch.equal(indices[0].sort().values, indices[0])


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (0, 3), (1, 1), (2, 2), (3, 8), (1, 2049)])
def test_small_sizes_have_what_there_is(dataset: DataSet, tokens: int, pages: int) -> None:
    inputs = tensors(dataset, ATTENTION[0], num_tokens=tokens, num_pages=pages)
    assert inputs["sparse_indices"].shape == (tokens, 2048)
    assert lengths(inputs["sparse_indices"])[:1] == [pages - pages // 8][:tokens]


def test_a_token_without_any_slot_is_an_error(dataset: DataSet) -> None:
    with pytest.raises(ValueError, match="sparse_indices: needs a slot, but num_pages is 0"):
        make(dataset, ATTENTION[0], num_tokens=1, num_pages=0)


# ---- the indexer


def kinds(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [slots, d] and scales [slots] of every slot, and which of them some sequence uses."""
    cache, page_size = inputs["k_index_cache_fp8"].flatten(1), inputs["k_index_cache_fp8"].shape[1]
    values = cache[:, : page_size * 128].view(torch.float8_e4m3fn).float().view(-1, 128)
    scales = cache[:, page_size * 128 :].view(torch.float32).flatten()
    used = torch.zeros(len(scales), dtype=torch.bool)
    for length, pages in zip(inputs["seq_lens"].tolist(), inputs["block_table"].tolist(), strict=True):
        used[[pages[j // page_size] * page_size + j % page_size for j in range(length)]] = True
    return values, scales, used


def test_packed_keys_hold_numbers_where_a_sequence_has_keys_and_nan_elsewhere(dataset: DataSet) -> None:
    for uuid, inputs in small(dataset, INDEXER).items():
        values, scales, used = kinds(inputs)
        assert values[used].isfinite().all(), uuid
        assert (scales[used] > 0).all(), uuid
        assert values[~used].isnan().all(), uuid
        assert scales[~used].isnan().all(), uuid
        unused = inputs["k_index_cache_fp8"].flatten(1)[:, : 64 * 128].reshape(-1, 128)[~used]
        assert set(unused.unique().tolist()) <= {0x7F, -1}


def test_the_layout_is_that_of_the_loops(dataset: DataSet) -> None:
    inputs = tensors(dataset, INDEXER, batch_size=1, max_num_pages=32, num_pages=32)
    raw = inputs["k_index_cache_fp8"][int(inputs["block_table"][0, 0])].flatten().view(torch.uint8).numpy().tobytes()
    values, scales, _ = kinds(inputs)
    slot = int(inputs["block_table"][0, 0]) * 64 + 5
    assert naive.key(raw, 5, 64, 128) == (values[slot].double() * scales[slot].double()).tolist()


def test_lengths_are_those_around_pages_and_the_choice(dataset: DataSet) -> None:
    inputs = tensors(dataset, INDEXER, batch_size=12, max_num_pages=100, num_pages=900)
    found = inputs["seq_lens"].tolist()
    assert found[1:10] == [0, 2049, 1, 63, 2048, 65, 64, 2047, 4097]
    assert 6400 - 64 < found[0] <= 6400
    assert max(found) <= 6400


@pytest.mark.parametrize("num_pages", [1, 31, 80, 1200])
def test_tables_name_pages_once_and_beyond_none_or_one_that_nobody_has(dataset: DataSet, num_pages: int) -> None:
    inputs = tensors(dataset, INDEXER, batch_size=9, max_num_pages=70, num_pages=num_pages)
    table, held = inputs["block_table"], []
    for row, length in enumerate(inputs["seq_lens"].tolist()):
        pages = table[row, : -(-length // 64)].tolist()
        assert len(set(pages)) == len(pages)
        assert all(0 <= page < num_pages for page in pages)
        held += pages
    beyond = {int(page) for row in range(9) for page in table[row, -(-int(inputs["seq_lens"][row]) // 64) :]}
    assert not beyond & set(held)
    assert -1 in beyond
    if num_pages == 1200:
        assert len(set(held)) == len(held), "there are enough for each"
        assert {0, num_pages - 1} <= set(held)
        assert len(beyond) == 2
        assert len(held) != num_pages


def test_scores_are_of_the_order_of_ten_and_differ(dataset: DataSet) -> None:
    inputs = tensors(dataset, INDEXER, batch_size=1, max_num_pages=32, num_pages=32)
    inputs["seq_lens"][:] = 200
    scores = naive.index_scores(**inputs)
    found = scores[scores > -math.inf]
    assert 1 < float(found.std()) < 100
    assert len(found.unique()) == 200


def test_only_a_workload_called_so_has_ties(dataset: DataSet) -> None:
    for uuid, different in (("edge_ties", 16), ("edge", 2000)):
        values, _, used = kinds(tensors(dataset, INDEXER, uuid=uuid, batch_size=1, max_num_pages=48, num_pages=60))
        assert int(used.sum()) > 2048
        assert (len(values[used].unique(dim=0)) == 16) == (different == 16)
    assert sum("ties" in w.uuid for w in dataset.workloads[INDEXER]) == 1


# ---- all


@pytest.mark.parametrize("name", NAMES)
def test_equal_names_draw_equal_numbers_and_another_seed_others(dataset: DataSet, name: str) -> None:
    axes = {"batch_size": 3, "max_num_pages": 40} if name == INDEXER else {"num_tokens": 3}
    first, second, other = (make(dataset, name, "w", seed, num_pages=50, **axes) for seed in (0, 0, 1))
    assert first.hash == second.hash != other.hash
    for key, value in first.tensors.items():
        if isinstance(value, torch.Tensor):
            again = second.tensors[key]
            assert isinstance(again, torch.Tensor)
            assert torch.equal(value.flatten().view(torch.uint8), again.flatten().view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_every_definition_has_the_sizes_that_find_faults(dataset: DataSet, name: str) -> None:
    made, chosen = small(dataset, name), dataset.workloads[name]
    assert len(made) >= 4
    assert sum(w.uuid.startswith("edge_") for w in chosen) >= 5
    assert sum(not w.uuid.startswith("edge_") for w in chosen) >= 3
    if name == INDEXER:
        found = {length for inputs in made.values() for length in inputs["seq_lens"].tolist()}
        assert {0, 1, 63, 64, 65, 2047, 2048, 2049} <= found
    else:
        counts = [lengths(inputs["sparse_indices"]) for inputs in made.values()]
        assert any(0 in count for count in counts)
        lines = (ROOT / "workloads/dsa_paged" / f"{name}.jsonl").read_text().splitlines()
        scales = {json.loads(line)["workload"]["inputs"]["sm_scale"]["value"] for line in lines}
        assert scales == {(128 + 64) ** -0.5}

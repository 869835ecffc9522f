"""Inputs of latent and ragged attention: caches hold numbers in the same slots, and rows of keys are shared out."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from refgrid.dataset.case import size_of
from refgrid.dataset.definition import DataSet, Definition, load_dataset
from refgrid.proving.inputs import make_inputs

ROOT = Path(__file__).parents[1]
OP_TYPES = ("gqa_ragged", "mla_paged", "mla_ragged")


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


def definitions(op_type: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "definitions" / op_type).glob("*.json"))


def small(dataset: DataSet, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Every small workload of a definition, made."""
    definition = dataset.definitions[name]
    chosen = [w for w in dataset.workloads[name] if size_of(definition, w) == "small"]
    return [(w.uuid, dict(make_inputs(definition, w, 0, "cpu", ROOT).tensors)) for w in chosen]


@pytest.mark.parametrize("name", definitions("mla_paged"))
def test_both_caches_hold_numbers_in_used_slots_and_nan_in_all_others(dataset: DataSet, name: str) -> None:
    for uuid, inputs in small(dataset, name):
        page_size, used = inputs["ckv_cache"].shape[1], set()
        for sequence, (start, end) in enumerate(pairwise(inputs["kv_indptr"].tolist())):
            keys = (end - start) * page_size
            if "kv_last_page_len" in inputs and keys:
                keys += int(inputs["kv_last_page_len"][sequence]) - page_size
            used |= {(int(inputs["kv_indices"][start + j // page_size]), j % page_size) for j in range(keys)}
        for cache in ("ckv_cache", "kpe_cache"):
            finite = inputs[cache].isfinite()
            assert torch.equal(finite.all(-1), finite.any(-1)), (uuid, cache)
            assert {(page, slot) for page, slot in finite.all(-1).nonzero().tolist()} == used, (uuid, cache)


@pytest.mark.parametrize("name", [name for op_type in ("gqa_ragged", "mla_ragged") for name in definitions(op_type)])
def test_keys_in_a_row_are_shared_out_whole(dataset: DataSet, name: str) -> None:
    for uuid, inputs in small(dataset, name):
        qo_len, kv_len = inputs["qo_indptr"].diff(), inputs["kv_indptr"].diff()
        assert int(qo_len.sum()) == len(inputs["q"]), uuid
        assert int(kv_len.sum()) == len(inputs["k"]) == len(inputs["v"]), uuid
        assert (qo_len >= 0).all()
        assert (kv_len >= 0).all()
        if qo_len.sum() <= kv_len.sum():
            assert (qo_len <= kv_len).all(), f"{uuid}: the normal case is normal: no query without its own key"


@pytest.mark.parametrize("name", [name for op_type in OP_TYPES for name in definitions(op_type)])
def test_every_definition_has_the_sizes_that_find_faults(dataset: DataSet, name: str) -> None:
    definition, chosen = dataset.definitions[name], dataset.workloads[name]
    made = [inputs for _, inputs in small(dataset, name)]
    batches = [inputs["kv_indptr"].diff() for inputs in made]

    assert len(made) >= 4
    assert sum(w.uuid.startswith("edge_") for w in chosen) >= 5
    assert sum(not w.uuid.startswith("edge_") for w in chosen) >= 3
    assert any(len(lengths) > 1 and (lengths == 0).any() for lengths in batches), "an empty sequence beside another"
    assert any(int(lengths.sum()) == 0 for lengths in batches), "no key at all"
    assert any(_has_more_queries_than_keys(inputs) for inputs in made if "qo_indptr" in inputs) or _is_decode(
        definition
    )


def _has_more_queries_than_keys(inputs: dict[str, Any]) -> bool:
    page_size = inputs["ckv_cache"].shape[1] if "ckv_cache" in inputs else 1
    return bool((inputs["qo_indptr"].diff() > inputs["kv_indptr"].diff() * page_size).any())


def _is_decode(definition: Definition) -> bool:
    return "qo_indptr" not in definition.inputs


@pytest.mark.parametrize("name", definitions("mla_paged"))
def test_the_scale_of_latent_attention_is_that_of_the_width_before_absorption(name: str) -> None:
    lines = (ROOT / "workloads" / "mla_paged" / f"{name}.jsonl").read_text().splitlines()

    scales = {json.loads(line)["workload"]["inputs"]["sm_scale"]["value"] for line in lines}

    assert scales == {1 / math.sqrt(128 + 64)}

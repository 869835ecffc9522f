"""Adapters and oracle of grouped attention: against a dense mask, and CUDA's way on a double of its operator."""

from __future__ import annotations

import importlib
import math
from typing import Any

import naive_grouped as naive
import pytest
import torch
from adapters import unchanged

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import Unavailable

OP = "gqa_grouped"
SIGHTED = [(11, 13, 3, 17, 1), (0, 5, 1, 9, 0), (6, 6, 2, 4, 1), (7, 11, 8, 12, 1)]  # query 5, 6, 13 are in no slice
SLICES = [
    pytest.param(SIGHTED, id="every query of a slice sees a key"),
    pytest.param([*SIGHTED, (13, 14, 5, 5, 0)], id="a full slice without keys"),
    pytest.param([(0, 6, 4, 7, 1), (7, 9, 4, 4, 1), (10, 14, 0, 20, 0)], id="more queries than keys"),
    pytest.param([], id="no slice"),
]


def drawn(entries: list[naive.Entry], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*size, 16, generator=generator).to(dtype) for size in ((14, 6), (20, 2), (20, 2)))
    unseen = ~naive.dense_mask(entries, 14, 20).any(0)
    k[unseen] = v[unseen] = 1e4
    table = torch.tensor(entries, dtype=torch.int32).reshape(-1, 5)
    columns = {"q_ranges": slice(0, 2), "k_ranges": slice(2, 4), "mask_types": 4}
    ranges = {name: table[:, column].clone(memory_format=torch.contiguous_format) for name, column in columns.items()}
    return {"q": q, "k": k, "v": v, **ranges, "sm_scale": 0.3}


def expected(inputs: dict[str, Any], entries: list[naive.Entry]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (inputs[name].double() for name in "qkv")
    out, lse = naive.attend(q, k, v, naive.dense_mask(entries, 14, 20), 0.3)
    return out, lse.T / math.log(2)


def close(actual: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile_rows", [512, 2])
@pytest.mark.parametrize("entries", SLICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_agree_with_the_definition(
    entries: list[naive.Entry], dtype: torch.dtype, tile_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("refgrid_groundtruth.paged"), "TILE_ROWS", tile_rows)
    monkeypatch.setattr(importlib.import_module("refgrid_groundtruth.oracle.grouped"), "SCORES", 60 * tile_rows)
    inputs = drawn(entries, dtype)
    output, lse = expected(inputs, entries)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    for source in ("torch", "oracle"):
        given = unchanged(groundtruth.adapter(source, OP, "cpu"), **inputs)
        assert (given["output"].dtype, given["lse"].dtype) == (dtype, torch.float32)
        close(given["output"], output, tolerance)
        close(given["lse"], lse, 2e-4 if source == "torch" else 1e-6)


@pytest.mark.parametrize("entries", SLICES)
def test_eager_attention_agrees_or_says_that_it_defines_nothing(entries: list[naive.Entry]) -> None:
    inputs = drawn(entries)
    eager = groundtruth.adapter("transformers", OP, "cpu")
    sees = naive.dense_mask(entries, 14, 20).any(1)

    if all(sees[start:end].all() for start, end, *_ in entries):
        given = unchanged(eager, **inputs)
        assert list(given) == ["output"]
        close(given["output"], expected(inputs, entries)[0], 3e-2)
    else:
        with pytest.raises(Unavailable, match=r"unsupported: slice \d has . queries and . keys: eager attention def"):
            eager(**inputs)


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cum_q: torch.Tensor,
    cum_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    mask: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """aten::_flash_attention_forward as CUDA has it: sequences in a row, lse [heads, rows] in base e, +inf if blind."""
    assert (dropout, mask, cum_q.dtype, cum_k.dtype) == (0.0, False, torch.int32, torch.int32)
    assert (max_q, max_k) == (max(2, int(cum_q.diff().max())), int(cum_k.diff().max()))
    starts = zip(cum_q.tolist(), cum_q.tolist()[1:], cum_k.tolist(), cum_k.tolist()[1:], strict=False)
    entries = [(*start, int(causal)) for start in starts]
    out, lse = naive.attend(q.double(), k.double(), v.double(), naive.dense_mask(entries, len(q), len(k)), scale)
    return out.to(q.dtype), torch.where(lse == -math.inf, math.inf, lse).float()


@pytest.mark.parametrize("entries", SLICES)
def test_on_cuda_each_mask_is_one_call_on_copies_of_the_keys(
    entries: list[naive.Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of CUDA on CPU tensors, whose device alone says otherwise."""
    module = importlib.import_module("refgrid_groundtruth.torch.grouped")
    calls: list[bool] = []

    def counted(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(args[8])
        return flash(*args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", counted)
    monkeypatch.setattr(module, "_on_cpu", module._on_cuda)
    inputs = drawn(entries)

    given = unchanged(module.gqa_grouped, **inputs)

    output, lse = expected(inputs, entries)
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-6)
    assert calls == sorted({bool(mask) for start, end, *_, mask in entries if start < end})


def test_an_lse_that_is_marked_where_keys_are_seen_is_no_translation(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that loses a row must not be repaired into a row that sees nothing."""
    module = importlib.import_module("refgrid_groundtruth.torch.grouped")

    def lost(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = flash(*args, **kwargs)
        return out, torch.full_like(lse, math.inf)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", lost)
    monkeypatch.setattr(module, "_on_cpu", module._on_cuda)

    given = module.gqa_grouped(**drawn(SIGHTED))

    assert given["lse"][:5].isposinf().all()

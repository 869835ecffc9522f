"""Sources of sparse attention and of its indexer: against loops, on doubles of kernels, and self-tests."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import naive_dsa as naive
import pytest
import torch
from adapters import unchanged

import refgrid_groundtruth as groundtruth
from refgrid.proving.chosen import compare_chosen
from refgrid.proving.tolerance import Tolerance
from refgrid_groundtruth import SOURCES, Unavailable, selftest
from refgrid_groundtruth.table import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Tensors = dict[str, torch.Tensor]

ATTENTION, INDEXER = FAMILIES["dsa"]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# ---- the oracle


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("keys", [[1, 7, 0, 3], [0], [0, 0, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_oracle_attends_as_defined(keys: list[int], page_size: int, dtype: torch.dtype) -> None:
    inputs = {**naive.draw_attention(keys, page_size, dtype=dtype), "sm_scale": 0.3}
    output, lse = naive.sparse_attention(**inputs)

    given = unchanged(groundtruth.adapter("oracle", ATTENTION, "cpu"), **inputs)

    assert (given["output"].dtype, given["lse"].dtype) == (dtype, torch.float32)
    close(given["output"], output, 1e-6 if dtype == torch.float32 else 1e-2)
    close(given["lse"], lse, 1e-6)


@pytest.mark.parametrize("lengths", [[0, 3, 4, 5, 20], [1], [0, 0]], ids=str)
def test_the_oracle_scores_as_defined(lengths: list[int]) -> None:
    inputs = naive.draw_index(lengths)

    given = unchanged(groundtruth.adapter("oracle", INDEXER, "cpu"), **inputs)

    assert given["topk_indices"].dtype == torch.float64
    close(given["topk_indices"], naive.index_scores(**inputs), 1e-12)


# ---- SGLang's kernels, on doubles with their parameters


def _sparse_fwd(
    q: torch.Tensor,
    kv: torch.Tensor,
    indices: torch.Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Base e, and +inf for a token without keys; rows of keys that no index names are not read."""
    assert attn_sink is topk_length is None
    assert {q.dtype, kv.dtype} == {torch.bfloat16}
    assert indices.dtype == torch.int32
    assert q.shape[1] in {64, 128}, f"Unsupported h_q: {q.shape[1]}"
    assert (q.shape[2], d_v) == (576, 512)
    assert (indices.shape[1], indices.shape[2] % 128, kv.shape[1]) == (1, 0, 1)
    assert kv.is_contiguous()
    parts = (q[..., :d_v], q[..., d_v:], kv[..., :d_v], kv[..., d_v:])
    given = importlib.import_module("refgrid_groundtruth.oracle.dsa").dsa_sparse_attention(
        *parts, indices[:, 0], sm_scale=sm_scale
    )
    base_2 = torch.where(given["lse"] == -math.inf, math.inf, given["lse"])
    return given["output"], torch.zeros_like(base_2), base_2


def _metadata(context_lens: torch.Tensor, block_kv: int, num_sms: int, indices: None = None) -> torch.Tensor:
    assert (context_lens.dtype, context_lens.ndim, context_lens.is_contiguous()) == (torch.int32, 2, True)
    assert (block_kv, num_sms, indices) == (64, 132, None)
    return torch.zeros(num_sms + 1, 2, dtype=torch.int32)


def _mqa_logits(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    weights: torch.Tensor,
    context_lens: torch.Tensor,
    block_table: torch.Tensor,
    schedule_meta: torch.Tensor,
    max_context_len: int,
    clean_logits: bool = False,
    indices: None = None,
) -> torch.Tensor:
    """[batch, max_context_len] by position; whatever was there beyond a sequence."""
    assert (q.dtype, kv_cache.dtype, weights.dtype) == (torch.float8_e4m3fn, torch.uint8, torch.float32)
    assert (q.ndim, q.shape[1], kv_cache.shape[1:]) == (4, 1, (64, 1, 132))
    assert (schedule_meta.shape, max_context_len) == ((133, 2), block_table.shape[1] * 64)
    assert (clean_logits, indices) == (False, None), "clean_logits refuses lengths of two dimensions"
    table = (kv_cache.view(torch.int8), weights, context_lens[:, 0], block_table)
    slots = importlib.import_module("refgrid_groundtruth.oracle.dsa").dsa_topk_indexer_fp8(q[:, 0], *table)
    logits = torch.full((len(q), max_context_len), math.nan)
    for row, length in enumerate(context_lens[:, 0].tolist()):
        for j in range(length):
            logits[row, j] = slots["topk_indices"][row, int(block_table[row, j // 64]) * 64 + j % 64]
    return logits


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An sglang without kernels, on the path; it and the adapters that import it are forgotten afterwards."""

    def of_sglang(name: str) -> bool:
        first = name.partition(".")[0]
        return first in {"sglang", "sgl_kernel", "deep_gemm"} or name.startswith("refgrid_groundtruth.sglang")

    held = {name: sys.modules.pop(name) for name in list(sys.modules) if of_sglang(name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(dataclasses.replace(s, devices=("cpu",)) for s in SOURCES))
    (tmp_path / "sglang-0.5.15.dist-info").mkdir()
    (tmp_path / "sglang-0.5.15.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.15\n")
    install(tmp_path, "sglang")
    yield tmp_path
    for name in [name for name in sys.modules if of_sglang(name)]:
        del sys.modules[name]
    sys.modules.update(held)


def install(folder: Path, name: str, **held: Any) -> None:
    """A package or module below `folder`, imported with what it holds."""
    file = folder.joinpath(*name.split(".")).with_suffix(".py")
    file = file if "." in name else folder / name / "__init__.py"
    file.parent.mkdir(exist_ok=True)
    file.touch()
    importlib.invalidate_caches()
    vars(importlib.import_module(name)).update(held)


@pytest.fixture
def kernels(fresh: Path) -> Path:
    install(fresh, "sgl_kernel")
    install(fresh, "sgl_kernel.flash_mla", flash_mla_sparse_fwd=_sparse_fwd)
    return fresh


@pytest.fixture
def _deep_gemm(kernels: Path) -> None:
    held = {"get_paged_mqa_logits_metadata": _metadata, "fp8_paged_mqa_logits": _mqa_logits}
    install(kernels, "deep_gemm", get_num_sms=lambda: 132, **held)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("page_size", "heads"), [(1, 16), (4, 16), (1, 64), (1, 80)])
def test_flashmla_gets_one_row_of_keys_and_heads_filled_up(page_size: int, heads: int) -> None:
    drawn = naive.draw_attention([3, 0, 128, 20], page_size, topk=128, slots=200, heads=heads, widths=(512, 64))
    inputs = {**drawn, "sm_scale": 0.1}

    given = unchanged(groundtruth.adapter("sglang", ATTENTION, "cpu"), **inputs)

    output, lse = naive.sparse_attention(**inputs)
    assert given["output"].is_contiguous()
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)  # base 2, and -inf where the library says +inf


@pytest.mark.usefixtures("_deep_gemm")
@pytest.mark.parametrize("lengths", [[0, 1, 63, 130, 64], [0, 0], [65]], ids=str)
def test_deep_gemms_logits_become_scores_of_slots(lengths: list[int]) -> None:
    inputs = naive.draw_index(lengths, page_size=64, heads=4, d=128, room=3, pages=12)

    given = unchanged(groundtruth.adapter("sglang", INDEXER, "cpu"), **inputs)["topk_indices"]

    scores = naive.index_scores(**inputs)
    assert (given.dtype, given.shape) == (torch.float64, (len(lengths), 12 * 64))
    close(given, scores, 1e-5)
    chosen = given.topk(20).indices.where(given.topk(20).values > -math.inf, -1)
    assert compare_chosen("topk_indices", chosen, scores, Tolerance(1e-5, 1e-5)).matches


def test_without_deep_gemm_attention_is_served_and_the_indexer_is_told(kernels: Path) -> None:
    assert kernels.exists()
    groundtruth.adapter("sglang", ATTENTION, "cpu")
    with pytest.raises(Unavailable, match="api-absent: sglang has no module deep_gemm"):
        groundtruth.adapter("sglang", INDEXER, "cpu")


def test_an_sglang_without_its_kernels_is_told(fresh: Path) -> None:
    assert fresh.exists()
    with pytest.raises(Unavailable) as caught:
        groundtruth.adapter("sglang", ATTENTION, "cpu")
    assert caught.value.verdict in {"api-absent", "import-fail"}


# ---- self-tests


def _of(op: str, output: str, change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[str, str, Any]:
    return op, output, change


WRONG = [
    pytest.param(*_of(ATTENTION, "lse", lambda x: x * math.log(2)), id="lse in base e"),
    pytest.param(*_of(ATTENTION, "lse", lambda x: x + 1), id="a key counted twice"),
    pytest.param(*_of(ATTENTION, "lse", lambda x: x.double()), id="lse in float64"),
    pytest.param(*_of(ATTENTION, "lse", lambda x: x.nan_to_num(neginf=-5e4)), id="a finite lse without keys"),
    pytest.param(*_of(ATTENTION, "lse", lambda x: x.nan_to_num(neginf=math.inf)), id="+inf without keys"),
    pytest.param(*_of(ATTENTION, "output", lambda x: x.flip(0)), id="tokens mixed up"),
    pytest.param(*_of(ATTENTION, "output", lambda x: x * 1.05), id="output off by 5 %"),
    pytest.param(*_of(INDEXER, "topk_indices", lambda x: x * 2), id="scale left out"),
    pytest.param(*_of(INDEXER, "topk_indices", lambda x: x.roll(64, 1)), id="scores by page of the table"),
    pytest.param(*_of(INDEXER, "topk_indices", lambda x: x.nan_to_num(neginf=0)), id="no candidate scores 0"),
    pytest.param(*_of(INDEXER, "topk_indices", lambda x: x.float()), id="another dtype"),
]


@pytest.mark.parametrize(("op", "output", "change"), WRONG)
def test_the_self_test_notices(op: str, output: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    oracle = groundtruth.adapter("oracle", op, "cpu")

    def wrong(**inputs: Any) -> Tensors:
        given = oracle(**inputs)
        return {**given, output: change(given[output])}

    selftest.run(oracle, op, "cpu")
    with pytest.raises(Unavailable, match=f"self-test failed: got {output}"):
        selftest.run(wrong, op, "cpu")


@pytest.mark.parametrize("input_name", ["k_index_cache_fp8", "weights", "seq_lens", "q_index_fp8"])
def test_the_known_scores_depend_on_every_input(input_name: str) -> None:
    oracle = groundtruth.adapter("oracle", INDEXER, "cpu")
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "k_index_cache_fp8": lambda x: x.flatten(1).view(-1, 64, 132).transpose(1, 2).reshape(x.shape),
        "weights": lambda x: x * 2,
        "seq_lens": lambda x: x - 1,
        "q_index_fp8": lambda x: x.float().flip(2).to(x.dtype),
    }

    def wrong(**inputs: Any) -> Tensors:
        return oracle(**{**inputs, input_name: changes[input_name](inputs[input_name])})

    with pytest.raises(Unavailable, match="self-test failed: got topk_indices"):
        selftest.run(wrong, INDEXER, "cpu")

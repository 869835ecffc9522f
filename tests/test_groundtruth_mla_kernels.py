"""FlashInfer's and FlashMLA's adapters of latent and ragged attention, on doubles with the libraries' parameters."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import naive_mla as naive
import pytest
import torch
from adapters import unchanged

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import SOURCES, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Tensors = dict[str, torch.Tensor]

RAGGED = ("gqa_ragged_prefill_causal", "mla_ragged_prefill_causal")


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# ---- FlashInfer's adapters, on doubles with its parameters that answer through the oracle


class Ragged:
    """BatchPrefillWithRaggedKVCacheWrapper; `called` holds what the last plan got."""

    called: ClassVar[dict[str, Any]] = {}

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, backend: str = "auto") -> None:
        self.called.clear()
        self.called.update(workspace=float_workspace_buffer, kv_layout=kv_layout, backend=backend)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        self.called.update({name: value for name, value in locals().items() if name != "self"})

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, return_lse: bool = False) -> Any:
        assert return_lse
        oracle = importlib.import_module("refgrid_groundtruth.oracle.mla")
        table = {name: self.called[name] for name in ("qo_indptr", "kv_indptr", "sm_scale")}
        given = oracle.mla_ragged_prefill_causal(q, k, v, **table)
        return given["output"], given["lse"].clamp(min=-5e4)


class Latent:
    """BatchMLAPagedAttentionWrapper, likewise."""

    called: ClassVar[dict[str, Any]] = {}

    def __init__(self, float_workspace_buffer: torch.Tensor, use_cuda_graph: bool = False, *, backend: str) -> None:
        assert not use_cuda_graph
        self.called.clear()
        self.called.update(workspace=float_workspace_buffer, backend=backend)

    def plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_len_arr: torch.Tensor,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        use_profiler: bool = False,
    ) -> None:
        assert not use_profiler
        assert {x.dtype for x in (qo_indptr, kv_indptr, kv_indices, kv_len_arr)} == {torch.int32}, "0.5.3 demands it"
        self.called.update({name: value for name, value in locals().items() if name != "self"})

    def run(
        self,
        q_nope: torch.Tensor,
        q_pe: torch.Tensor,
        ckv_cache: torch.Tensor,
        kpe_cache: torch.Tensor,
        *,
        return_lse: bool = False,
    ) -> Any:
        assert return_lse
        oracle = importlib.import_module("refgrid_groundtruth.oracle.mla")
        pages, size = self.called["kv_indptr"].diff(), self.called["page_size"]
        last = self.called["kv_len_arr"] - (pages - 1) * size
        names = ("qo_indptr", "kv_indptr", "kv_indices", "sm_scale")
        table = {name: self.called[name] for name in names} | {"kv_last_page_len": last}
        given = oracle.mla_paged_prefill_causal(q_nope, q_pe, ckv_cache, kpe_cache, **table)
        return given["output"], given["lse"].clamp(min=-5e4)  # what 0.6.7 writes for -inf


def install(folder: Path, distribution: str, version: str, modules: Mapping[str, Mapping[str, Any]]) -> None:
    """Packages below `folder`, one of them of a distribution, imported with what their modules hold."""
    info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name in modules:
        file = folder.joinpath(*name.split(".")).with_suffix(".py")
        file = file if "." in name else folder / name / "__init__.py"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    importlib.invalidate_caches()
    for name, held in modules.items():
        vars(importlib.import_module(name)).update(held)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path whose packages, and the adapters that import them, are forgotten afterwards."""
    ours = ("refgrid_groundtruth.flashinfer", "refgrid_groundtruth.sglang")

    def of_a_library(name: str) -> bool:
        return name.partition(".")[0] in {"flashinfer", "sglang", "sgl_kernel"} or name.startswith(ours)

    held = {name: sys.modules.pop(name) for name in list(sys.modules) if of_a_library(name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    here = [dataclasses.replace(source, devices=("cpu",)) for source in SOURCES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    yield tmp_path
    for name in [name for name in sys.modules if of_a_library(name)]:
        del sys.modules[name]
    sys.modules.update(held)


@pytest.fixture
def _flashinfer(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules: dict[str, dict[str, Any]] = {
        "flashinfer": {},
        "flashinfer.decode": {},
        "flashinfer.prefill": {"BatchPrefillWithRaggedKVCacheWrapper": Ragged},
        "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": Latent},
    }
    install(fresh, "flashinfer-python", "0.6.12", modules)
    monkeypatch.setattr(importlib.import_module("refgrid_groundtruth.flashinfer.gqa"), "WORKSPACE_BYTES", 1024)


@pytest.mark.usefixtures("_flashinfer")
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("op", ["mla_paged_decode", "mla_paged_prefill_causal"])
def test_flashinfers_mla_gets_the_plan_it_wants(op: str, page_size: int, backend: str) -> None:
    decode = op == "mla_paged_decode"
    inputs = {**naive.draw_paged([1, 1, 1] if decode else [2, 3, 0], [5, 0, 2], page_size), "sm_scale": 0.3}
    output, lse = naive.mla_paged(**inputs)
    qo_indptr = inputs.pop("qo_indptr") if decode else inputs["qo_indptr"]

    given = unchanged(groundtruth.adapter(f"flashinfer-{backend}", op, "cpu"), **inputs)

    called = Latent.called
    assert (called["backend"], called["causal"], called["sm_scale"]) == (backend, not decode, 0.3)
    sizes = [called[name] for name in ("num_heads", "head_dim_ckv", "head_dim_kpe", "page_size")]
    assert sizes == [4, 16, 8, page_size]
    assert called["kv_len_arr"].tolist() == [5, 0, 2]
    assert torch.equal(called["qo_indptr"], qo_indptr)
    assert called["kv_indptr"] is inputs["kv_indptr"]
    assert called["kv_indices"] is inputs["kv_indices"]
    assert (called["q_data_type"], called["kv_data_type"]) == (torch.bfloat16, torch.bfloat16)
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)  # -inf again where the library says -5e4


@pytest.mark.usefixtures("_flashinfer")
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize(("heads", "widths"), [((6, 2), (16, 16)), ((2, 2), (24, 16))])
def test_flashinfers_ragged_prefill_gets_the_plan_it_wants(
    heads: tuple[int, int], widths: tuple[int, int], backend: str
) -> None:
    inputs = {**naive.draw_ragged([2, 3, 0], [5, 0, 2], heads=heads, widths=widths), "sm_scale": 0.3}
    output, lse = naive.ragged_prefill(**inputs)
    op = RAGGED[widths[0] != widths[1]]

    given = unchanged(groundtruth.adapter(f"flashinfer-{backend}", op, "cpu"), **inputs)

    called = Ragged.called
    assert (called["kv_layout"], called["backend"], called["causal"], called["sm_scale"]) == ("NHD", backend, True, 0.3)
    sizes = [called[name] for name in ("num_qo_heads", "num_kv_heads", "head_dim_qk", "head_dim_vo")]
    assert sizes == [*heads, *widths]
    assert called["qo_indptr"] is inputs["qo_indptr"]
    assert called["kv_indptr"] is inputs["kv_indptr"]
    assert (called["q_data_type"], called["kv_data_type"]) == (torch.bfloat16, torch.bfloat16)
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)


@pytest.mark.usefixtures("_flashinfer")
@pytest.mark.parametrize("op", RAGGED)
def test_fa3_declines_rows_without_keys_in_a_row_too(op: str) -> None:
    inputs = naive.draw_ragged([2, 3], [4, 2], heads=(2, 2), widths=(8, 8))

    assert (
        groundtruth.adapter("flashinfer-fa2", op, "cpu")(**inputs, sm_scale=1.0)["lse"][2].tolist() == [-math.inf] * 2
    )
    with pytest.raises(Unavailable, match="unsupported: sequence 1 has 3 queries but 2 keys: fa3 defines nothing"):
        groundtruth.adapter("flashinfer-fa3", op, "cpu")(**inputs, sm_scale=1.0)


# ---- FlashMLA's adapter, likewise


def _metadata(
    cache_seqlens: torch.Tensor, num_q_tokens_per_head_k: int, num_heads_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    assert cache_seqlens.dtype == torch.int32
    return torch.tensor([num_q_tokens_per_head_k, num_heads_k]), torch.tensor([7])


def _flash_mla(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int,
    tile_scheduler_metadata: torch.Tensor,
    num_splits: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Base e, [batch, heads, 1], and +inf for no key; loads the first page even for no key."""
    assert tile_scheduler_metadata.tolist() == [q.shape[2], k_cache.shape[2]]
    assert num_splits is not None
    assert softmax_scale is not None
    assert (block_table.dtype, q.shape[1], causal) == (torch.int32, 1, False)
    keys, values = [], []
    for pages, length in zip(block_table.tolist(), cache_seqlens.tolist(), strict=True):
        cache = k_cache[pages].flatten(0, 1)[:length].double()
        keys.append(cache)
        values.append(cache[..., :head_dim_v])
    output, lse = naive.attention(q[:, 0].double(), keys, values, [1] * len(q), softmax_scale)
    natural = torch.where(lse == -math.inf, math.inf, lse * math.log(2)).float()
    return output[:, None].to(q.dtype), natural[:, :, None]


@pytest.fixture
def _sglang(fresh: Path) -> None:
    held = {"flash_mla_with_kvcache": _flash_mla, "get_mla_metadata": _metadata}
    install(fresh, "sglang", "0.5.15", {"sglang": {}, "sgl_kernel": {}, "sgl_kernel.flash_mla": held})


@pytest.mark.usefixtures("_sglang")
@pytest.mark.parametrize("kv_len", [[5, 1, 70], [3, 0, 130], [0, 0]], ids=str)
def test_flashmla_gets_one_cache_and_a_block_table(kv_len: list[int]) -> None:
    inputs = {**naive.draw_paged([1] * len(kv_len), kv_len, 64), "sm_scale": 0.3}
    output, lse = naive.mla_paged(**inputs)
    del inputs["qo_indptr"]

    given = unchanged(groundtruth.adapter("sglang", "mla_paged_decode", "cpu"), **inputs)

    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)  # base 2 again, and -inf where the library says +inf


@pytest.mark.usefixtures("_sglang")
def test_flashmla_declines_pages_of_another_size() -> None:
    inputs = naive.draw_paged([1], [3], 4)
    del inputs["qo_indptr"]

    with pytest.raises(Unavailable, match="unsupported: page_size is 4 but FlashMLA wants 64"):
        groundtruth.adapter("sglang", "mla_paged_decode", "cpu")(**inputs, sm_scale=1.0)


def test_an_sglang_without_its_kernels_is_told(fresh: Path) -> None:
    install(fresh, "sglang", "0.5.15", {"sglang": {}})

    with pytest.raises(Unavailable) as caught:
        groundtruth.adapter("sglang", "mla_paged_decode", "cpu")

    assert caught.value.verdict in {"api-absent", "import-fail"}

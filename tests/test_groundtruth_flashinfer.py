"""FlashInfer's adapters, on a double that takes what the library takes and answers through PyTorch."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from adapters import unchanged
from naive_gqa import batch, by_hand, close

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import SOURCES, Unavailable
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType


class Wrapper:
    """Either paged wrapper; `called` holds what the last plan and run got."""

    called: ClassVar[dict[str, Any]] = {}
    minus_infinity = -5e4  # what FlashInfer writes up to 0.6
    planned = ("indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size")

    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        self.called.clear()
        self.called.update(workspace=workspace, kv_layout=kv_layout, **options)

    def plan(self, *args: Any, **options: Any) -> None:
        names = self.planned if len(args) == len(self.planned) else ("qo_indptr", *self.planned)
        self.called.update(dict(zip(names, args, strict=True)), **options)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], *, return_lse: bool) -> Any:
        assert return_lse
        called = self.called
        truth = importlib.import_module("refgrid_groundtruth.torch.gqa")
        rows = torch.arange(len(q) + 1, dtype=torch.int32)
        given = truth.gqa_paged_prefill_causal(
            q, *caches, called.get("qo_indptr", rows), called["indptr"], called["indices"], called["last_page_len"],
            sm_scale=called["sm_scale"],
        )  # fmt: skip
        return given["output"], given["lse"].clamp(min=self.minus_infinity)


def _rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    residual += x
    x.copy_(_rmsnorm(residual, weight, eps))


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapters' module over the double, installed as FlashInfer 0.6.12 and served on the CPU."""
    package, info = tmp_path / "flashinfer", tmp_path / "flashinfer_python-0.6.12.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.6.12\n")
    for name in ("__init__", "norm", "decode", "prefill"):
        (package / f"{name}.py").touch()
    names = ["flashinfer", "flashinfer.norm", "flashinfer.decode", "flashinfer.prefill"]
    names += [f"refgrid_groundtruth.flashinfer.{family}" for family in ("norm", "gqa")]
    held = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(tmp_path))
    norm, decode, prefill = (importlib.import_module(name) for name in names[1:4])
    vars(norm).update(rmsnorm=_rmsnorm, fused_add_rmsnorm=_fused_add_rmsnorm)
    vars(decode).update(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    vars(prefill).update(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    here = [dataclasses.replace(source, devices=("cpu",)) for source in SOURCES if source.library == "flashinfer"]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    module = importlib.import_module("refgrid_groundtruth.flashinfer.gqa")
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1024)
    yield module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(held)


DOUBLED = ("norm", "gqa")
PAGED = [
    (source.name, op)
    for source in SOURCES
    if source.library == "flashinfer"
    for op in source.ops
    if FAMILY[op] in DOUBLED and "ragged" not in op
]


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(("source", "op"), PAGED)
def test_flashinfer_passes_its_self_test_through_the_double(source: str, op: str) -> None:
    assert callable(groundtruth.adapter(source, op, "cpu"))


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_norms_work_on_copies() -> None:
    norm = importlib.import_module("refgrid_groundtruth.flashinfer.norm")
    x, residual, weight = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.full((8,), 4.0)

    given = unchanged(
        lambda **inputs: norm.fused_add_rmsnorm(**inputs, eps=7.0),
        hidden_states=x,
        residual=residual,
        weight=weight,
    )

    assert given["output"].tolist() == [[3.0] * 8] * 2
    assert given["residual_out"].tolist() == [[3.0] * 8] * 2
    assert norm.rmsnorm(given["residual_out"], weight, eps=7.0)["output"].tolist() == [[3.0] * 8] * 2


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(
    ("source", "op", "options"),
    [
        ("flashinfer", "gqa_paged_decode", {"use_tensor_cores": False, "backend": "fa2"}),
        ("flashinfer-fa2", "gqa_paged_decode", {"use_tensor_cores": True, "backend": "fa2"}),
        ("flashinfer-fa2", "gqa_paged_prefill_causal", {"backend": "fa2", "causal": True}),
        ("flashinfer-fa3", "gqa_paged_prefill_causal", {"backend": "fa3", "causal": True}),
    ],
)
def test_flashinfer_gets_the_plan_it_wants(source: str, op: str, options: dict[str, Any], page_size: int) -> None:
    inputs = batch([1, 1, 1], [5, 0, 2], page_size, torch.bfloat16)
    output, lse = by_hand(inputs)
    if op == "gqa_paged_decode":
        del inputs["qo_indptr"]
    adapter = groundtruth.adapter(source, op, "cpu")

    given = unchanged(adapter, **inputs)

    called = Wrapper.called
    assert {name: called[name] for name in options} == options
    assert (called["kv_layout"], called["q_data_type"], called["kv_data_type"]) == (
        "NHD",
        torch.bfloat16,
        torch.bfloat16,
    )
    assert [called[name] for name in Wrapper.planned[3:]] == [6, 2, 16, page_size]
    assert called["last_page_len"].tolist() == [1, 0, 1 if page_size == 1 else 2], "0 where a sequence is empty"
    assert called["last_page_len"].dtype == torch.int32
    assert called["indptr"] is inputs["kv_indptr"]
    assert called["indices"] is inputs["kv_indices"]
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)  # -inf again where the library says -5e4
    workspace = called["workspace"]
    adapter(**inputs)
    assert Wrapper.called["workspace"] is workspace, "allocated once"


def test_flashinfers_stand_in_for_infinity_is_translated_in_rows_without_keys_only(flashinfer: ModuleType) -> None:
    lse = torch.tensor([[-5e4 + 3], [-5e4 + 3], [-math.inf], [1.0]])

    translated = flashinfer.with_infinity(lse, torch.tensor([True, False, True, True]))

    assert translated.flatten().tolist() == [-math.inf, -5e4 + 3, -math.inf, 1.0]


@pytest.mark.usefixtures("flashinfer")
def test_fa3_declines_rows_without_keys_but_takes_an_empty_sequence() -> None:
    fa3 = groundtruth.adapter("flashinfer-fa3", "gqa_paged_prefill_causal", "cpu")

    assert fa3(**batch([2, 3], [4, 0], 4))["lse"][2:].tolist() == [[-math.inf] * 6] * 3
    with pytest.raises(Unavailable, match="unsupported: sequence 1 has 3 queries but 2 keys: fa3 defines nothing"):
        fa3(**batch([2, 3], [4, 2], 4))


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        pytest.param(RuntimeError("Unsupported group_size: 6"), Unavailable, id="a refusal in words"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access"), RuntimeError, id="a fault stays one"),
    ],
)
def test_what_flashinfer_refuses_is_unsupported(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    decode = groundtruth.adapter("flashinfer", "gqa_paged_decode", "cpu")

    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(Wrapper, "plan", refuse)
    inputs = batch([1], [3], 4)
    del inputs["qo_indptr"]

    with pytest.raises(expected, match=str(raised)):
        decode(**inputs)

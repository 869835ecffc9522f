"""FlashInfer's and SGLang's adapters of the gated delta rule, on doubles of the libraries' functions."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import doubles_gdn as doubles
import naive_gdn as naive
import pytest
import torch

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import SOURCES, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    Tensors = dict[str, torch.Tensor]

OPS = ("gdn_decode", "gdn_mtp", "gdn_prefill")


FLA = "sglang.srt.layers.attention.fla"
MODULES: dict[str, tuple[str, ...]] = {
    "flashinfer.gdn_decode": ("gated_delta_rule_decode_pretranspose", "gated_delta_rule_mtp"),
    "flashinfer.gdn_prefill": ("flashinfer_chunk_gated_delta_rule",),
    f"{FLA}.chunk": ("sglang_chunk_gated_delta_rule",),
    f"{FLA}.fused_sigmoid_gating_recurrent": ("fused_sigmoid_gating_delta_rule_update",),
}


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both libraries as packages of their own, the CUTLASS DSL beside them, served on the CPU."""
    _write(tmp_path)
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _theirs(name)}
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, functions in MODULES.items():
        module = importlib.import_module(name)
        for function in functions:
            setattr(module, function.split("_", 1)[1] if "chunk" in function else function, getattr(doubles, function))
    here = [dataclasses.replace(source, devices=("cpu",), compiles=False) for source in SOURCES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    doubles.called.clear()
    yield
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(held)


def _theirs(name: str) -> bool:
    own = name in ("refgrid_groundtruth.flashinfer.gdn", "refgrid_groundtruth.sglang.gdn")
    return own or name.split(".", maxsplit=1)[0] in ("flashinfer", "sglang", "cutlass")


def _write(root: Path) -> None:
    for name in (*MODULES, "cutlass.cute"):
        *packages, module = name.split(".")
        folder = root.joinpath(*packages)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{module}.py").touch()
        for depth in range(len(packages)):
            root.joinpath(*packages[: depth + 1], "__init__.py").touch()
    for name, version in (("flashinfer_python", "0.6.12"), ("sglang", "0.5.15")):
        info = root / f"{name}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(head)


KERNELS = ("flashinfer", "sglang")


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("source", KERNELS)
@pytest.mark.parametrize("op", OPS)
def test_the_self_test_passes_through_the_double(source: str, op: str) -> None:
    assert callable(groundtruth.adapter(source, op, "cpu"))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("source", KERNELS)
@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_kernels_agree_with_the_definition(source: str, scale: float) -> None:
    sizes: dict[str, Any] = {"heads": (1, 2), "d": 128, "scale": scale}
    naive.agree(groundtruth.adapter(source, "gdn_decode", "cpu"), "gdn_decode", naive.decode(3, **sizes))
    naive.agree(groundtruth.adapter(source, "gdn_mtp", "cpu"), "gdn_mtp", naive.mtp([3, 0], 3, 5, **sizes))
    prefill = naive.prefill([0, 5, 0, 3, 1, 0], **sizes)
    naive.agree(groundtruth.adapter(source, "gdn_prefill", "cpu"), "gdn_prefill", prefill)


@pytest.mark.usefixtures("libraries")
def test_padding_is_flashinfers_and_not_sglangs() -> None:
    inputs = naive.mtp([-1, 1, -2, 0], 2, 4, (1, 2), 128)
    given = naive.agree(groundtruth.adapter("flashinfer", "gdn_mtp", "cpu"), "gdn_mtp", inputs)
    assert not given["output"][[0, 2]].any()
    with pytest.raises(Unavailable, match="unsupported: 2 of 4 sequences are padding"):
        groundtruth.adapter("sglang", "gdn_mtp", "cpu")(**inputs)


@pytest.mark.usefixtures("libraries")
def test_the_kernels_get_what_they_want() -> None:
    inputs = naive.prefill([0, 5, 2], (1, 2), 128)
    groundtruth.adapter("flashinfer", "gdn_prefill", "cpu")(**inputs)
    assert doubles.called["cu_seqlens"].tolist() == [0, 5, 7]
    assert doubles.called["g"].max() <= 1
    assert doubles.called["g"].min() >= 0, "the gate, not its logarithm"
    assert doubles.called["scale"] is None
    groundtruth.adapter("sglang", "gdn_prefill", "cpu")(**inputs)
    assert doubles.called["g"].max() <= 0, "the logarithm"
    assert doubles.called["initial_state_indices"].tolist() == [1, 2]
    assert doubles.called["initial_state"].shape == inputs["state"].shape


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("op", ["gdn_decode", "gdn_mtp"])
def test_without_the_cutlass_dsl_the_cute_kernels_are_missing(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cutlass" else find(name))
    with pytest.raises(Unavailable, match=r"missing: flashinfer.gdn_decode needs nvidia-cutlass-dsl"):
        groundtruth.adapter("flashinfer", op, "cpu")
    assert callable(groundtruth.adapter("flashinfer", "gdn_prefill", "cpu"))


@pytest.mark.usefixtures("libraries")
def test_a_release_without_the_functions_lacks_them() -> None:
    del sys.modules["flashinfer.gdn_decode"].gated_delta_rule_mtp
    with pytest.raises(Unavailable, match=r"api-absent: flashinfer has no flashinfer.gdn_decode.gated_delta_rule_mtp"):
        groundtruth.adapter("flashinfer", "gdn_mtp", "cpu")


@pytest.mark.parametrize("source", ["transformers", "flashinfer", "sglang"])
def test_a_batch_without_any_token_is_nobodys(source: str, libraries: None) -> None:
    del libraries
    with pytest.raises(Unavailable, match="unsupported: no sequence has a token"):
        groundtruth.adapter(source, "gdn_prefill", "cpu")(**naive.prefill([0, 0], (4, 8), 128))

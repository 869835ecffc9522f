"""FlashInfer and SGLang as packages of the doubles that the tests of their adapters have, served on a CPU."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import doubles_gdn
import doubles_moe
import pytest
import test_groundtruth_dsa as dsa
import test_groundtruth_flashinfer as paged
import test_groundtruth_gdn_kernels as gdn
import test_groundtruth_mamba_rope as mamba_rope
import test_groundtruth_mla_kernels as mla
import test_groundtruth_sglang as triton
import torch

import refgrid_groundtruth as groundtruth

VERSIONS = {"flashinfer_python": "0.6.12", "sglang": "0.5.15"}
LIBRARIES = ("flashinfer", "sglang", "sgl_kernel", "cutlass")
MODULES: dict[str, dict[str, Any]] = {
    "cutlass": {},  # FlashInfer's gated delta rule asks whether it is there
    "sgl_kernel": {},
    "flashinfer.norm": {"rmsnorm": paged._rmsnorm, "fused_add_rmsnorm": paged._fused_add_rmsnorm},
    "flashinfer.decode": {"BatchDecodeWithPagedKVCacheWrapper": paged.Wrapper},
    "flashinfer.prefill": {
        "BatchPrefillWithPagedKVCacheWrapper": paged.Wrapper,
        "BatchPrefillWithRaggedKVCacheWrapper": mla.Ragged,
    },
    "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": mla.Latent},
    "sgl_kernel.flash_mla": {
        "flash_mla_with_kvcache": mla._flash_mla,
        "get_mla_metadata": mla._metadata,
        "flash_mla_sparse_fwd": dsa._sparse_fwd,
    },
    "flashinfer.gdn_decode": {
        "gated_delta_rule_decode_pretranspose": doubles_gdn.gated_delta_rule_decode_pretranspose,
        "gated_delta_rule_mtp": doubles_gdn.gated_delta_rule_mtp,
    },
    "flashinfer.gdn_prefill": {"chunk_gated_delta_rule": doubles_gdn.flashinfer_chunk_gated_delta_rule},
    f"{gdn.FLA}.chunk": {"chunk_gated_delta_rule": doubles_gdn.sglang_chunk_gated_delta_rule},
    f"{gdn.FLA}.fused_sigmoid_gating_recurrent": {
        "fused_sigmoid_gating_delta_rule_update": doubles_gdn.fused_sigmoid_gating_delta_rule_update
    },
    **triton.MODULES,
    **{path: {name: double} for path, (name, double) in mamba_rope.DOUBLES.items()},
    **doubles_moe.MODULES,
}


@contextmanager
def served_on_a_cpu(site: Path) -> Iterator[None]:
    """Both libraries below `site`, on the path, and every source served on a CPU; all is forgotten afterwards."""
    _write(site)
    held = {name: sys.modules.pop(name) for name in list(sys.modules) if _theirs(name)}
    with pytest.MonkeyPatch.context() as patch, _operators():
        patch.syspath_prepend(str(site))
        for path, functions in MODULES.items():
            vars(importlib.import_module(path)).update(functions)
        here = [dataclasses.replace(source, devices=("cpu",), compiles=False) for source in groundtruth.SOURCES]
        patch.setattr(groundtruth, "SOURCES", tuple(here))
        groundtruth._outcome.cache_clear()
        yield
    groundtruth._outcome.cache_clear()
    for name in [name for name in sys.modules if _theirs(name)]:
        del sys.modules[name]
    sys.modules.update(held)


def _theirs(name: str) -> bool:
    ours = tuple(f"refgrid_groundtruth.{library}" for library in LIBRARIES)
    return name.partition(".")[0] in LIBRARIES or name.startswith(ours)


def _write(site: Path) -> None:
    for path in MODULES:
        folder = site.joinpath(*path.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        for package in (folder, *folder.parents[: path.count(".")]):
            (package / "__init__.py").touch()
    for name, version in VERSIONS.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        head = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(head)


@contextmanager
def _operators() -> Iterator[None]:
    """The operators that sgl_kernel registers when it is imported."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name, (schema, function) in triton.NORMS.items():
        library.define(f"{name}({schema}) -> ()")
        library.impl(name, function, "CPU")
    yield
    library._destroy()
    for name in triton.NORMS:
        vars(torch.ops.sgl_kernel).pop(name, None)  # what was looked up is kept there

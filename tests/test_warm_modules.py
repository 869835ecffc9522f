"""Which generators of FlashInfer's are called for each adapter, and with what.

FlashInfer itself is a double here. Where it is installed, the names of the modules are compared with those that its
functions ask for when the adapters call them.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import refgrid_groundtruth as groundtruth
from refgrid.dataset.case import op_of
from refgrid.dataset.definition import load_dataset
from refgrid.sources import Sources
from refgrid.warming.warm import plan_warm
from refgrid_groundtruth import SOURCES, Unavailable
from refgrid_groundtruth.kernels import Kernels, kernels

ROOT = Path(__file__).resolve().parents[1]
BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
PREFILL = (BF16, BF16, BF16, I32)
PLAIN = (0, False, False)
GENERATORS = {
    "norm": ["gen_norm_module"],
    "rope": ["gen_rope_module"],
    "sampling": ["gen_sampling_module"],
    "topk": ["gen_topk_module"],
    "gdn": ["gen_gdn_prefill_sm90_module"],
    "page": ["gen_page_module"],
    "dsv3_optimizations": ["gen_dsv3_fused_routing_module"],
    "attention.modules": ["gen_batch_decode_module", "gen_batch_prefill_module", "gen_batch_mla_module"],
    "fused_moe": [f"gen_cutlass_fused_moe_sm{arch}_module" for arch in (89, 90, 100, 103, 120)]
    + ["gen_trtllm_gen_fused_moe_sm100_module"],
}


class Spec(SimpleNamespace):
    """A module that would be compiled; FlashInfer's own has these, and a folder of its own or one for all."""

    def get_library_path(self) -> Path:
        return Path(f"/cache/{self.name}/{self.name}.so")

    def build(self, verbose: bool, need_lock: bool) -> None:
        self.builds.append((verbose, need_lock))


class Double:
    """FlashInfer, as far as its modules go: `called` holds the generators and their arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.specs: list[Spec] = []
        self._monkeypatch = monkeypatch
        for path, generators in GENERATORS.items():
            for name in generators:
                self.generator(f"jit.{path}", name)
        self.generator("jit.mamba", "gen_selective_state_update_module")
        for name in ("norm", "prefill"):
            self.module(name)
        later = type("JitSpec", (), {"build_dir": None, "build": lambda *_: None})
        vars(self.module("jit.core"))["JitSpec"] = later

    def module(self, path: str) -> ModuleType:
        """flashinfer.<path>, with its packages."""
        parts = ["flashinfer", *path.split(".")]
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in sys.modules:
                made = ModuleType(name)
                made.__path__ = []
                made.__spec__ = importlib.util.spec_from_loader(name, None)
                self._monkeypatch.setitem(sys.modules, name, made)
        return sys.modules[".".join(parts)]

    def generator(self, path: str, name: str, like: Callable[..., object] | None = None) -> None:
        """A function of that module; `like` tells its parameters."""

        def generate(*arguments: Any) -> Spec:
            self.called.append((name, *arguments))
            self.specs.append(
                Spec(
                    name=f"{name}{len(self.called)}", sources=["a", "b"], is_aot=False, builds=[], build_dir="/cache/x"
                )
            )
            return self.specs[-1]

        if like is not None:
            generate.__wrapped__ = like  # type: ignore[attr-defined]
        setattr(self.module(path), name, generate)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr("refgrid_groundtruth.kernels._demand_library", lambda _: None)
    monkeypatch.setattr("refgrid_groundtruth.kernels._demand_functions", lambda *_: None)
    forget = importlib.import_module("refgrid_groundtruth.flashinfer.modules")._module.cache_clear
    forget()
    yield Double(monkeypatch)
    forget()


def asked(double: Double, source: str, op: str, **inputs: tuple[tuple[int | None, ...], str]) -> list[tuple[Any, ...]]:
    double.called.clear()
    kernels(source, op, inputs)
    return double.called


def prefill(backend: str, d_qk: int, d_vo: int) -> tuple[Any, ...]:
    return ("gen_batch_prefill_module", backend, *PREFILL, d_qk, d_vo, *PLAIN, False)


def mla(backend: str) -> tuple[Any, ...]:
    return ("gen_batch_mla_module", backend, *PREFILL, 512, 64, False)


EXPERTS = ("gen_cutlass_fused_moe_sm90_module",)
RENORMALISED = [("gen_topk_module",), ("gen_sampling_module",), EXPERTS]


@pytest.mark.parametrize(
    ("source", "op", "expected"),
    [
        ("flashinfer", "rmsnorm", [("gen_norm_module",)]),
        ("flashinfer", "fused_add_rmsnorm", [("gen_norm_module",)]),
        ("flashinfer", "rope_with_cos_sin_cache_neox_style", [("gen_rope_module",)]),
        ("flashinfer", "top_k_sampling_from_probs", [("gen_sampling_module",)]),
        ("flashinfer", "gqa_paged_decode", [("gen_batch_decode_module", *PREFILL, 128, 128, *PLAIN)]),
        ("flashinfer-fa2", "gqa_paged_decode", [prefill("fa2", 128, 128)]),
        ("flashinfer-fa2", "gqa_paged_prefill_causal", [prefill("fa2", 128, 128)]),
        ("flashinfer-fa3", "gqa_ragged_prefill_causal", [prefill("fa3", 128, 128)]),
        ("flashinfer-fa3", "mla_ragged_prefill_causal", [prefill("fa3", 192, 128)]),
        ("flashinfer-fa2", "mla_paged_decode", [mla("fa2")]),
        ("flashinfer-fa3", "mla_paged_prefill_causal", [mla("fa3")]),
        ("flashinfer", "gdn_prefill", [("gen_gdn_prefill_sm90_module",)]),
        ("flashinfer", "gdn_decode", []),
        ("flashinfer", "moe_fp8_block_scale_ds_routing", [("gen_dsv3_fused_routing_module",), EXPERTS]),
        ("flashinfer", "moe_fp8_block_scale_renorm", RENORMALISED),
        ("flashinfer", "trtllm_fp8_per_tensor_scale_moe", RENORMALISED),
        ("flashinfer", "trtllm_fp4_block_scale_routed_moe", [EXPERTS]),
        ("flashinfer", "mamba_ssu_decode", [("gen_selective_state_update_module",)]),
    ],
)
def test_each_adapter_has_its_generators(double: Double, source: str, op: str, expected: list[tuple[Any, ...]]) -> None:
    assert asked(double, source, op) == expected


def test_the_definitions_sizes_count_beside_those_of_the_self_test(double: Double) -> None:
    head = ((None, 8, 256), "float16")
    found = asked(double, "flashinfer-fa2", "gqa_ragged_prefill_causal", q=head, k=head, v=head)

    half = torch.float16
    wide = ("gen_batch_prefill_module", "fa2", half, half, half, I32, 256, 256, *PLAIN, False)
    assert found == [prefill("fa2", 128, 128), wide]


def test_fa2_has_a_module_for_equal_strides_since_0_7(double: Double) -> None:
    double.generator("jit.attention.modules", "_gen_batch_prefill_primary_module")

    assert asked(double, "flashinfer-fa2", "gqa_paged_decode")[0][0] == "_gen_batch_prefill_primary_module"
    assert asked(double, "flashinfer-fa3", "gqa_paged_prefill_causal")[0][0] == "gen_batch_prefill_module"


def test_fa3_spells_pages_out_up_to_0_5(double: Double) -> None:
    vars(double.module("prefill"))["block_sparse_indices_to_vector_sparse_offsets"] = None

    assert asked(double, "flashinfer-fa3", "gqa_paged_prefill_causal")[1:] == [("gen_page_module",)]
    assert len(asked(double, "flashinfer-fa2", "gqa_paged_prefill_causal")) == 1


def _state_update(
    state_dtype: Any, input_dtype: Any, weight_dtype: Any, matrixA_dtype: Any, stateIndex_dtype: Any,  # noqa: N803
    state_scale_dtype: Any, dim: Any, dstate: Any, ntokens_mtp: Any, philox_rounds: Any = 0,
) -> None:  # fmt: skip
    """The parameters of 0.6.6; later ones have two dtypes more."""


def test_a_state_update_is_made_for_its_dtypes_as_far_as_a_release_asks(double: Double) -> None:
    double.generator("jit.mamba", "gen_selective_state_update_sm90_module", like=_state_update)

    expected = ("gen_selective_state_update_sm90_module", BF16, BF16, BF16, F32, I32, None, 64, 128, 1)
    assert asked(double, "flashinfer", "mamba_ssu_decode") == [expected]


def test_norms_by_cute_dsl_are_compiled_at_the_first_call(double: Double) -> None:
    vars(double.module("norm"))["_USE_CUDA_NORM"] = False
    assert kernels("flashinfer", "rmsnorm", {}) == Kernels(at_first_call="CuTe DSL")

    vars(double.module("norm"))["_cute_dsl_supports_arch"] = lambda *_: False
    assert asked(double, "flashinfer", "rmsnorm") == [("gen_norm_module",)]


@pytest.mark.parametrize(("arch", "module"), [("8.9", 89), ("10.0a", 100), ("10.3a", 103), ("12.1a", 120)])
def test_experts_are_compiled_for_the_gpu(
    double: Double, monkeypatch: pytest.MonkeyPatch, arch: str, module: int
) -> None:
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", arch)

    found = asked(double, "flashinfer", "trtllm_fp4_block_scale_routed_moe")
    assert found == [(f"gen_cutlass_fused_moe_sm{module}_module",)]


def test_a_source_of_one_gpu_is_not_compiled_for_another(double: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unavailable, match=r"flashinfer-trtllm needs compute capability 10\.0 exactly"):
        kernels("flashinfer-trtllm", "moe_fp8_block_scale_renorm", {})

    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "10.0a")
    found = asked(double, "flashinfer-trtllm", "moe_fp8_block_scale_renorm")
    assert found == [("gen_trtllm_gen_fused_moe_sm100_module",)]


def test_a_module_is_built_as_flashinfer_builds_it_unless_it_came_compiled(double: Double) -> None:
    (module,) = kernels("flashinfer", "rmsnorm", {}).ahead
    (spec,) = double.specs
    module.compile()
    spec.is_aot = True
    module.compile()

    assert spec.builds == [(False, True)]
    assert (module.sources, module.folder) == (2, Path("/cache/x"))


def test_up_to_0_5_all_modules_share_ninjas_folder(double: Double) -> None:
    def generate() -> SimpleNamespace:
        library = Path("/cache/cached_ops/rope/rope.so")
        return SimpleNamespace(name="rope", sources=[], jit_library_path=library, get_library_path=lambda: library)

    vars(double.module("jit.rope"))["gen_rope_module"] = generate

    (module,) = kernels("flashinfer", "rope_with_cos_sin_cache_neox_style", {}).ahead
    assert module.folder == Path("/cache/cached_ops")


@pytest.mark.usefixtures("double")
def test_the_published_definitions_can_all_be_asked_about() -> None:
    plan = plan_warm(load_dataset(ROOT).definitions.values(), Sources())

    assert plan.broken == {}
    assert len(plan.modules) >= 14
    assert "Triton" in plan.at_first_call["sglang gqa_paged_decode"]
    assert not any("sglang" in user for users in plan.users.values() for user in users)


def test_whoever_compiles_nothing_has_no_modules() -> None:
    assert kernels("torch", "rmsnorm", {}) == kernels("oracle", "gdn_decode", {}) == Kernels()


def test_what_is_not_installed_is_unavailable_and_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = [dataclasses.replace(each, library="no_such_library", adapters="flashinfer") for each in SOURCES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(gone))

    with pytest.raises(Unavailable, match="no_such_library is not installed"):
        kernels("flashinfer", "rmsnorm", {})


def test_every_op_of_flashinfers_is_foretold() -> None:
    families = importlib.import_module("refgrid_groundtruth.flashinfer.modules")._FAMILIES
    ops = {op for source in SOURCES if source.library == "flashinfer" for op in source.ops}

    assert {groundtruth.table.FAMILY[op] for op in ops} == set(families)
    assert {op_of(each, ops) for each in load_dataset(ROOT).definitions.values()} & ops == ops


def test_flashinfer_asks_for_the_modules_that_were_foretold(tmp_path: Path) -> None:
    """The real library, where there is one: nothing that an adapter loads is missing."""
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("flashinfer is not installed")
    env = {**os.environ, "FLASHINFER_WORKSPACE_BASE": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests" / "flashinfer_rehearsal.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=900)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]

    assert [line for line in lines if len(line) == 5], done.stderr[-2000:]
    assert [line for line in lines if len(line) == 5 and line[2] != line[3]] == []

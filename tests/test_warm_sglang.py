"""Which modules of SGLang's can be compiled ahead: what its own functions would give to tvm-ffi, both doubles here."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from refgrid_groundtruth.kernels import Kernels, Module, kernels

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
ROPE, GROUPED = "rope_with_cos_sin_cache_neox_style", "moe_fp8_block_scale_renorm"
BUILDERS = {
    "rope": "_jit_fused_rope_module",
    "activation": "_jit_activation_module",
    "per_tensor_quant_fp8": "_jit_per_tensor_quant_fp8_module",
    "per_token_group_quant_8bit_v2": "_jit_module",
}
# A tvm-ffi that compiles: it leaves what it was told, or fails with a compiler's words.
CPP = """
import json, os, pathlib
def build_inline(name, build_directory, cuda_sources):
    if cuda_sources == ["bad"]:
        raise SystemExit("cuda.cu(3): error: no")
    folder = pathlib.Path(build_directory)
    folder.mkdir(parents=True)
    (folder / f"{name}.so").write_text(os.environ["TVM_FFI_CUDA_ARCH_LIST"])
"""


class Double:
    """SGLang's jit_kernel as far as its builders go, with a GPU of no known capability."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch, self._capability, self.source = monkeypatch, (0, 0), "good"
        for name in ("sglang", "sglang.jit_kernel", "tvm_ffi"):
            self.module(name)
        self.utils, self.cpp = self.module("sglang.jit_kernel.utils"), self.module("tvm_ffi.cpp")
        vars(self.cpp)["load_inline"] = self.never
        vars(self.utils).update(override_jit_cuda_arch=self.override, _jit_build_dir_name=self.never)
        for name, builder in BUILDERS.items():
            vars(self.module(f"sglang.jit_kernel.{name}"))[builder] = self.cached(self.builder(name))

    def module(self, name: str) -> ModuleType:
        self._monkeypatch.setitem(sys.modules, name, made := ModuleType(name))
        made.__path__ = []
        return made

    def never(self, *_: Any, **__: Any) -> None:
        raise AssertionError("nothing is built or loaded while the modules are listed")

    @contextmanager
    def override(self, major: int, minor: int) -> Iterator[None]:
        self._capability = major, minor
        yield
        self._capability = 0, 0

    def builder(self, name: str) -> Callable[..., Any]:
        """As `load_jit`: what is there already is loaded, else tvm-ffi is asked by its name."""

        def build(*arguments: Any) -> Any:
            called = "_".join([name, *map(str, arguments)])
            folder = Path(os.environ["TVM_FFI_CACHE_DIR"], f"{called}__arch_{self._capability}")
            if (folder / f"{called}.so").exists():
                self.never()
            load_inline = importlib.import_module("tvm_ffi.cpp").load_inline
            return load_inline(called, cuda_sources=[self.source], build_directory=str(folder))

        return build

    def cached(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """As `cache_once`, which would keep what was told for a loaded module."""

        def wrapper(*_: Any) -> None:
            self.never()

        wrapper.__wrapped__ = build  # type: ignore[attr-defined]  # as functools.wraps sets it
        return wrapper


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Double:
    (package := tmp_path / "tvm_ffi").mkdir()
    (package / "__init__.py").touch()
    (package / "cpp.py").write_text(CPP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process that compiles
    monkeypatch.setenv("TVM_FFI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    monkeypatch.setattr("refgrid_groundtruth.kernels._demand_library", lambda _: None)
    importlib.import_module("refgrid_groundtruth.sglang.modules")._module.cache_clear()
    return Double(monkeypatch)


def names(found: Kernels) -> list[str]:
    return [module.library.stem for module in found.ahead]


def rope() -> Module:
    (module,) = kernels("sglang", ROPE, {}).ahead
    return module


@pytest.mark.parametrize(
    ("op", "modules", "later"),
    [
        (ROPE, [f"rope_True_64_{BF16}"], ""),
        (GROUPED, [f"activation_{BF16}", f"per_token_group_quant_8bit_v2_{BF16}_{FP8}_True"], "Triton"),
        (
            "trtllm_fp8_per_tensor_scale_moe",
            [f"activation_{BF16}", *(f"per_tensor_quant_fp8_{static}_{BF16}" for static in (True, False))],
            "Triton",
        ),
        ("trtllm_fp4_block_scale_moe", [f"activation_{BF16}"], "Triton"),
        ("gqa_paged_decode", [], "Triton"),
        ("dsa_topk_indexer_fp8", [], "DeepGEMM"),
        ("rmsnorm", [], ""),
    ],
)
@pytest.mark.usefixtures("double")
def test_each_op_has_its_modules(op: str, modules: list[str], later: str) -> None:
    found = kernels("sglang", op, {})

    assert (names(found), found.at_first_call) == (modules, later)


@pytest.mark.usefixtures("double")
def test_a_definitions_sizes_name_its_module(tmp_path: Path) -> None:
    q, table, positions = ((None, 8, 256), "float16"), ((None, 128), "float32"), ((None,), "int64")
    found = kernels("sglang", ROPE, {"q": q, "k": q, "cos_sin_cache": table, "positions": positions})
    own = found.ahead[1]

    assert names(found) == [f"rope_True_64_{BF16}", f"rope_True_128_{torch.float16}"]
    assert own.library == tmp_path / "cache" / f"{own.library.stem}__arch_(9, 0)" / f"{own.library.stem}.so"
    assert (own.folder, own.name) == (own.library.parent, own.folder.name)


@pytest.mark.usefixtures("double")
def test_there_is_a_module_for_each_gpu_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "8.9 9.0a")

    folders = [module.name for module in kernels("sglang", GROUPED, {}).ahead]  # in a plan a name is there once

    assert [folder.partition("__arch_")[2] for folder in folders] == ["(8, 9)", "(8, 9)", "(9, 0)", "(9, 0)"]
    assert "_False__" in folders[1]  # no dependent launch there


@pytest.mark.usefixtures("double")
def test_a_module_is_compiled_for_its_gpu_where_sglang_will_look_for_it() -> None:
    module = rope()

    module.compile()

    assert module.library.read_text() == "9.0"
    assert "TVM_FFI_CUDA_ARCH_LIST" not in os.environ
    assert rope().library == module.library  # listed again, it is not loaded


def test_a_build_that_fails_says_what_the_compiler_said(double: Double) -> None:
    double.source = "bad"

    with pytest.raises(RuntimeError, match=r"cuda\.cu\(3\): error: no"):
        rope().compile()


@pytest.mark.parametrize("lacks", ["_jit_build_dir_name", "override_jit_cuda_arch"])
def test_a_release_that_cannot_be_asked_compiles_at_the_first_call(double: Double, lacks: str) -> None:
    del vars(double.utils)[lacks]

    assert kernels("sglang", ROPE, {}).ahead == ()
    assert kernels("sglang", ROPE, {}).at_first_call.startswith("nvcc, as SGLang does not tell what: ")
    assert kernels("sglang", GROUPED, {}).at_first_call.startswith("Triton, nvcc, as SGLang does not tell what: ")


@pytest.mark.usefixtures("double")
def test_a_release_without_a_function_compiles_at_the_first_call() -> None:
    del vars(sys.modules["sglang.jit_kernel.rope"])["_jit_fused_rope_module"]

    found = kernels("sglang", ROPE, {})

    assert found.ahead == ()
    assert "_jit_fused_rope_module" in found.at_first_call


def test_what_is_told_can_be_handed_to_another_process(double: Double) -> None:
    modules = importlib.import_module("refgrid_groundtruth.sglang.modules")

    told = modules._told(modules.Recipe("activation", BUILDERS["activation"], ()), (9, 0))

    assert json.loads(json.dumps(told))["cuda_sources"] == [double.source]
    assert vars(double.cpp)["load_inline"] == double.never

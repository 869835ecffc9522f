"""What SGLang compiles: modules of CUDA C++, with nvcc, and at the first call Triton's and DeepGEMM's kernels.

Read in 0.5.15. The kernels of sgl_kernel come compiled, and its samplers are plain torch. SGLang builds a module at its
first call, for the GPU at hand, and loads from then on what is in its folder (TVM_FFI_CACHE_DIR). So its own functions
are called for another capability and with the build held back, and tell all that tvm-ffi would have been given.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from refgrid_groundtruth.kernels import Kernels, Module, architectures
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from refgrid_groundtruth.kernels import Call
    from refgrid_groundtruth.table import Source

# What needs a GPU: Triton and DeepGEMM compile for what they are called with.
COMPILERS = {"gqa": "Triton", "gdn": "Triton", "mamba": "Triton", "moe": "Triton"}
CACHE = "TVM_FFI_CACHE_DIR"
_BUILD = "import json, sys\nfrom tvm_ffi.cpp import build_inline\nbuild_inline(**json.load(sys.stdin))"


@dataclass(frozen=True)
class Recipe:
    """A function of SGLang's that builds and loads a module, and its arguments; equal ones give one module."""

    module: str
    builder: str
    arguments: tuple[Any, ...]


def kernels(_: Source, op: str, calls: Sequence[Call]) -> Kernels:
    """What the adapter of an op loads for these calls, and what it compiles besides."""
    if op == "dsa_topk_indexer_fp8":
        return Kernels(at_first_call="DeepGEMM")
    later = COMPILERS.get(FAMILY[op], "")
    wanted = dict.fromkeys(
        (recipe, capability)
        for call in calls
        for capability in architectures()
        for recipe in _recipes(op, call, capability)
    )
    try:
        return Kernels(tuple(_module(*each) for each in wanted), later)
    except (ImportError, AttributeError) as error:  # a release that cannot be asked, or not here
        return Kernels(at_first_call=", ".join(filter(None, [later, f"nvcc, as SGLang does not tell what: {error}"])))


def _recipes(op: str, call: Call, capability: tuple[int, int]) -> Iterator[Recipe]:
    """The router of the experts, moe_fused_gate, is Triton's."""
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    if FAMILY[op] == "rope":
        yield Recipe("rope", "_jit_fused_rope_module", (True, call["cos_sin_cache"].shape[1], call["q"].dtype))
    if FAMILY[op] != "moe":
        return
    yield Recipe("activation", "_jit_activation_module", (bf16,))
    if "fp8_per_tensor" in op:  # GEMM1's input has a scale, GEMM2's gets one
        yield Recipe("per_tensor_quant_fp8", "_jit_per_tensor_quant_fp8_module", (True, bf16))
        yield Recipe("per_tensor_quant_fp8", "_jit_per_tensor_quant_fp8_module", (False, bf16))
    elif "fp8" in op:
        dependent_launch = capability[0] >= 9
        yield Recipe("per_token_group_quant_8bit_v2", "_jit_module", (bf16, fp8, dependent_launch))


@functools.cache
def _module(recipe: Recipe, capability: tuple[int, int]) -> Module:
    told = _told(recipe, capability)
    folder = Path(os.environ.get(CACHE, "~/.cache/tvm-ffi")).expanduser() / Path(told["build_directory"]).name
    told["build_directory"] = str(folder)
    build = functools.partial(_compile, told, "{}.{}".format(*capability))
    return Module(
        folder.name, folder / f"{told['name']}.so", folder, 1, build
    )  # its capability is in the folder's name


def _told(recipe: Recipe, capability: tuple[int, int]) -> dict[str, Any]:
    """What SGLang gives to tvm-ffi's load_inline where nothing is built yet."""
    utils, cpp = import_module("sglang.jit_kernel.utils"), import_module("tvm_ffi.cpp")
    builder = getattr(import_module(f"sglang.jit_kernel.{recipe.module}"), recipe.builder)
    if not hasattr(utils, "_jit_build_dir_name"):
        raise AttributeError("this release leaves the folder of a module to tvm-ffi")
    keep = patch.object(cpp, "load_inline", lambda name, **told: {"name": name, **told})
    with keep, patch.dict(os.environ, {CACHE: "/nonexistent"}), utils.override_jit_cuda_arch(*capability):
        told: dict[str, Any] = builder.__wrapped__(*recipe.arguments)  # past its cache, which belongs to loaded modules
    return told


def _compile(told: dict[str, Any], architecture: str) -> None:
    """As SGLang does, but without loading it; in a process of its own, since the capability is a variable."""
    variables = {**os.environ, "TVM_FFI_CUDA_ARCH_LIST": architecture}
    command = [sys.executable, "-c", _BUILD]
    done = subprocess.run(command, input=json.dumps(told), env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)

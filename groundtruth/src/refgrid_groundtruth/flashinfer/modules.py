"""The modules of CUDA C++ that FlashInfer's functions load for the adapters of this folder.

FlashInfer names a module after what is compiled into it. So its own generators, called with the arguments that the
adapter's call leads to, give the very file that the call will look for. The ways there were read, and the names
compared with what the adapters ask for, in 0.5.0, 0.5.3, 0.6.3, 0.6.6, 0.6.7.post3, 0.6.12 and 0.7.2.post1. A function
without a generator in a release is served by CuTe DSL there, which compiles at the first call.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refgrid_groundtruth.flashinfer import builds
from refgrid_groundtruth.kernels import Kernels, Module, architectures, demand
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from refgrid_groundtruth.kernels import Call
    from refgrid_groundtruth.table import Source

CUTE = "CuTe DSL"
INDEX = torch.int32
PLAIN = (0, False, False)  # no positional encoding, no sliding window, no cap on the logits


@dataclass(frozen=True)
class Recipe:
    """A generator of FlashInfer's and its arguments; equal ones give one module."""

    module: str
    generator: str
    arguments: tuple[Any, ...] = ()


def kernels(source: Source, op: str, calls: Sequence[Call]) -> Kernels:
    """What the adapter of a source loads for these calls."""
    demand(source, op)
    guard_builds()
    options = source.options.get(op, {})
    recipes = dict.fromkeys(
        recipe
        for call in calls
        for capability in architectures()
        for recipe in _FAMILIES[FAMILY[op]](op, {**call, **options}, capability)
    )
    ahead = tuple(_module(recipe) for recipe in recipes)
    return Kernels(ahead, "" if ahead else CUTE)


def _norm(_: str, __: Call, capability: tuple[int, int]) -> Iterator[Recipe]:
    norm = import_module("flashinfer.norm")
    supports = getattr(norm, "_cute_dsl_supports_arch", lambda *_: True)  # since 0.7
    if getattr(norm, "_USE_CUDA_NORM", True) or not supports(*capability):  # up to 0.6.3 there is no choice
        yield Recipe("norm", "gen_norm_module")


def _rope(_: str, __: Call, ___: tuple[int, int]) -> Iterator[Recipe]:
    yield Recipe("rope", "gen_rope_module")


def _sampling(_: str, __: Call, ___: tuple[int, int]) -> Iterator[Recipe]:
    yield Recipe("sampling", "gen_sampling_module")


def _gqa(op: str, call: Call, _: tuple[int, int]) -> Iterator[Recipe]:
    q = call["q"]
    if op == "gqa_ragged_prefill_causal":
        yield _prefill(call["backend"], q, call["k"], call["v"].shape[2])
    elif op == "gqa_paged_prefill_causal":
        yield _prefill(call["backend"], q, call["k_cache"], q.shape[2])
        if call["backend"] == "fa3" and hasattr(
            _flashinfer("prefill"), "block_sparse_indices_to_vector_sparse_offsets"
        ):
            yield Recipe("page", "gen_page_module")  # up to 0.5 fa3 spells pages out slot by slot
    elif call["use_tensor_cores"]:
        yield _prefill("fa2", q, call["k_cache"], q.shape[2])
    else:
        dtypes = (q.dtype, call["k_cache"].dtype, q.dtype, INDEX)
        yield Recipe("attention.modules", "gen_batch_decode_module", (*dtypes, q.shape[2], q.shape[2], *PLAIN))


def _prefill(backend: str, q: torch.Tensor, k: torch.Tensor, head_dim_vo: int) -> Recipe:
    """Since 0.7 fa2 has a module for keys and values of equal strides, as all are here, besides the general one."""
    module, generator = "attention.modules", "gen_batch_prefill_module"
    if backend == "fa2" and hasattr(_flashinfer(f"jit.{module}"), "_gen_batch_prefill_primary_module"):
        generator = "_gen_batch_prefill_primary_module"
    sizes = (q.shape[2], head_dim_vo, *PLAIN)
    return Recipe(module, generator, (backend, q.dtype, k.dtype, q.dtype, INDEX, *sizes, False))


def _mla(op: str, call: Call, _: tuple[int, int]) -> Iterator[Recipe]:
    if op == "mla_ragged_prefill_causal":
        yield _prefill(call["backend"], call["q"], call["k"], call["v"].shape[2])
        return
    q, cache = call["q_nope"], call["ckv_cache"]
    dtypes = (q.dtype, cache.dtype, q.dtype, INDEX)
    sizes = (q.shape[2], call["q_pe"].shape[2])
    yield Recipe("attention.modules", "gen_batch_mla_module", (call["backend"], *dtypes, *sizes, False))


def _mamba(_: str, call: Call, capability: tuple[int, int]) -> Iterator[Recipe]:
    """Up to 0.6.3 one module serves all; later ones are made for their dtypes and sizes, ever more of them."""
    jit = _flashinfer("jit.mamba")
    wanted = ["gen_selective_state_update_module"]
    wanted += [f"gen_selective_state_update_sm{major}0_module" for major in (9, 10) if capability[0] >= major]
    generator = next(name for name in reversed(wanted) if hasattr(jit, name))
    parameters, known = inspect.signature(getattr(jit, generator)).parameters, _state_update(call)
    yield Recipe("mamba", generator, tuple(known[name] for name in parameters if name in known))


def _state_update(call: Call) -> dict[str, Any]:
    """One token a sequence, no scales, no lengths: the dtypes of what is left out are FlashInfer's own choice."""
    dim, dstate = call["state"].shape[2:4]
    dtypes = {"state": "state", "input": "x", "weight": "dt", "matrixA": "A", "stateIndex": "state_batch_indices"}
    left_out = {"state_scale": None, "cu_seqlens": torch.int32, "num_accepted_tokens": torch.int64}
    of_dtype = {**{name: call[given].dtype for name, given in dtypes.items()}, **left_out}
    return {
        **{f"{name}_dtype": dtype for name, dtype in of_dtype.items()},
        "dim": dim,
        "dstate": dstate,
        "ntokens_mtp": 1,
    }


def _gdn(op: str, _: Call, capability: tuple[int, int]) -> Iterator[Recipe]:
    if op == "gdn_prefill" and capability[0] == 9 and find_spec("flashinfer.jit.gdn"):
        yield Recipe("gdn", "gen_gdn_prefill_sm90_module")


def _moe(op: str, call: Call, capability: tuple[int, int]) -> Iterator[Recipe]:
    if call.get("trtllm"):
        yield Recipe("fused_moe", "gen_trtllm_gen_fused_moe_sm100_module")
        return
    if op == "moe_fp8_block_scale_ds_routing":
        yield Recipe("dsv3_optimizations", "gen_dsv3_fused_routing_module")
    elif op != "trtllm_fp4_block_scale_routed_moe":  # _renormalised
        yield Recipe("topk", "gen_topk_module")
        yield Recipe("sampling", "gen_sampling_module")
    served = {121: 120, 110: 100, 107: 100}  # by the module of another capability
    number = 10 * capability[0] + capability[1]
    yield Recipe("fused_moe", f"gen_cutlass_fused_moe_sm{served.get(number, number)}_module")


_FAMILIES: Mapping[str, Callable[[str, Call, tuple[int, int]], Iterator[Recipe]]] = {
    "norm": _norm,
    "rope": _rope,
    "sampling": _sampling,
    "gqa": _gqa,
    "mla": _mla,
    "mamba": _mamba,
    "gdn": _gdn,
    "moe": _moe,
}


@functools.cache
def _module(recipe: Recipe) -> Module:
    """Generating writes the sources that are made from templates."""
    spec = getattr(_flashinfer(f"jit.{recipe.module}"), recipe.generator)(*recipe.arguments)
    library = Path(spec.get_library_path())
    return Module(spec.name, library, _folder(spec), len(spec.sources), functools.partial(_compile, spec))


def guard_builds() -> None:
    """Before the first module is built or loaded, in a warm and in a run."""
    builds.guard(_flashinfer("jit.core").JitSpec)


def _folder(spec: Any) -> Path:
    """Where ninja keeps its log: in the module's own folder, up to 0.5 in one for all."""
    return Path(spec.build_dir if hasattr(spec, "build_dir") else spec.jit_library_path.parent.parent)


def _compile(spec: Any) -> None:
    """As FlashInfer itself does before it loads a module, so that ninja finds nothing left to do then."""
    if not spec.is_aot:  # it came compiled, in flashinfer-jit-cache
        spec.build(verbose=False, need_lock=True)


def _flashinfer(name: str) -> Any:
    return import_module(f"flashinfer.{name}")

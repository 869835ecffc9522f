"""What sources compile: modules that can be compiled ahead of a run, and what compiles at the first call on a GPU.

Each library's folder may have a `modules.py` that knows this library's; it is asked with the inputs of a definition, as
tensors without memory, and with those of the self-test, which runs before any case.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from refgrid_groundtruth import Unavailable, _demand_functions, _demand_library, _source, selftest
from refgrid_groundtruth.table import Source

# What FlashInfer reads: the compute capabilities to compile for, "9.0a" or "9.0a 10.0a".
ARCHITECTURES = "FLASHINFER_CUDA_ARCH_LIST"

Call = Mapping[str, Any]  # the inputs of one call of an adapter by name


@dataclass(frozen=True)
class Module:
    """A module that can be compiled ahead: the file it becomes, and the folder where no two may be built at once.

    `compile` leaves it there, up to date, and raises an exception with the compiler's words.
    """

    name: str
    library: Path
    folder: Path
    sources: int
    compile: Callable[[], None]


@dataclass(frozen=True)
class Kernels:
    """What one source needs for one op; `at_first_call` names what compiles then and cannot before."""

    ahead: tuple[Module, ...] = ()
    at_first_call: str = ""


def kernels(source_name: str, op: str, inputs: Mapping[str, tuple[tuple[int | None, ...], str]]) -> Kernels:
    """What the adapter of a source will load for a definition with these inputs.

    Of each input the shape, with None for what a workload binds, and the dtype. Needs no GPU. Raises LookupError as
    `adapter` does, and Unavailable when the library or one of its functions is not there.
    """
    source = _source(source_name, op)
    library = f"{__package__}.{source.folder}.modules"
    if find_spec(library) is None:
        return Kernels()
    _demand_library(source)
    calls = [selftest.answer(op)[0]]
    if inputs:
        calls.append({name: _without_memory(*form) for name, form in inputs.items()})
    found: Kernels = import_module(library).kernels(source, op, calls)
    return found


def demand(source: Source, op: str) -> None:
    """Raise Unavailable unless the library has what the adapter calls, for the GPUs to compile for."""
    _demand_functions(source, op)
    if source.capability is not None and source.capability not in architectures():
        wanted = "{}.{}".format(*source.capability)
        raise Unavailable("unsupported", f"{source.name} needs compute capability {wanted} exactly")


def architectures() -> list[tuple[int, int]]:
    """The compute capabilities to compile for."""
    parts = (name.rstrip("af").partition(".") for name in os.environ.get(ARCHITECTURES, "").split())
    return [(int(major), int(minor)) for major, _, minor in parts]


def _without_memory(shape: tuple[int | None, ...], dtype: str) -> torch.Tensor:
    return torch.empty([size or 1 for size in shape], dtype=getattr(torch, dtype, torch.uint8), device="meta")

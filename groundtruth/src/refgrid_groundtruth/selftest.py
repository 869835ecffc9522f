"""Proof before use: the device is what a source needs, and a tiny case of each op gives the answer known by hand.

A self-test goes through the very adapter that will serve, so a changed argument order, layout, unit or default of the
library is an error of the source here, not a mismatch of a reference later.
"""

from __future__ import annotations

import os
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth import Adapter
    from refgrid_groundtruth.table import Source

    Answer = tuple[dict[str, Any], dict[str, torch.Tensor]]  # inputs and constants, expected outputs

TOLERANCE = 1e-2  # a bfloat16 has 8 bits; the answers are of the order of 1, and a wrong one is far off


def demand_device(source: Source, device: str) -> None:
    """A CUDA device of the compute capability that the source's kernels exist for, and a compiler where it needs one.

    Raises Unavailable("unsupported") or Unavailable("no-compiler").
    """
    if not device.startswith("cuda"):
        return
    if not torch.cuda.is_available():
        raise Unavailable("unsupported", f"torch {torch.__version__} sees no CUDA device")
    found, needed = torch.cuda.get_device_capability(device), source.capability
    if needed is not None and found != needed:
        reason = f"{torch.cuda.get_device_name(device)} has compute capability {found[0]}.{found[1]}"
        raise Unavailable("unsupported", f"{reason} but {source.name} needs {needed[0]}.{needed[1]} exactly")
    if source.compiles and not has_compiler():
        raise Unavailable("no-compiler", f"{source.name} compiles at the first call, and there is no nvcc")


def has_compiler() -> bool:
    """Whether there is an nvcc where FlashInfer looks for it, or its kernels were built ahead."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    built_ahead = find_spec("flashinfer_jit_cache") is not None
    return (
        built_ahead
        or shutil.which("nvcc") is not None
        or any(Path(home, "bin", "nvcc").is_file() for home in homes if home)
    )


def run(adapter: Adapter, op: str, device: str) -> None:
    """Raises Unavailable("error") at the first element of an output that is wrong."""
    given, expected = answer(op)
    result = adapter(**{name: _on(device, value) for name, value in given.items()})
    if not result or not set(result) <= set(expected):
        raise Unavailable("error", f"self-test failed: got {sorted(result)} but should be {sorted(expected)}")
    for name, tensor in result.items():
        _demand_equal(name, tensor.cpu(), _as_law(expected[name], tensor))


def answer(op: str) -> Answer:
    """The op's tiny case: inputs and constants by name, and the outputs known by hand."""
    cases: dict[str, Callable[[], Answer]] = import_module(f"refgrid_groundtruth.answers.{FAMILY[op]}").CASES
    return cases[op]()


def _on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _as_law(expected: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A truth may give the law behind random samples; with that of an answer, the one possible outcome is certain."""
    if expected.is_floating_point() or not tensor.is_floating_point():
        return expected
    return torch.nn.functional.one_hot(expected.long(), tensor.shape[-1]).to(tensor.dtype)


def _demand_equal(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    form = [(list(tensor.shape), str(tensor.dtype)) for tensor in (actual, expected)]
    if form[0] != form[1]:
        raise Unavailable("error", f"self-test failed: got {name} of {form[0]} but should be {form[1]}")
    error, size = (actual.double() - expected.double()).abs(), expected.double().abs()
    near = (error <= TOLERANCE * size.clamp(min=1)) & size.isfinite()  # nothing is near infinity
    wrong = ~near & (actual != expected)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        got, should = actual[at].item(), expected[at].item()
        reason = f"self-test failed: got {name}{list(at)} = {got:.6g} but should be {should:.6g}"
        raise Unavailable("error", f"{reason} ({int(wrong.sum())} of {wrong.numel()} wrong)")

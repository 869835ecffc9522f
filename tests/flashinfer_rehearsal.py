"""Which modules FlashInfer's functions ask for when the adapters call them, found out without a GPU.

A script, for an environment with FlashInfer: every adapter goes through its self-test's call on the CPU, as if on a
Hopper GPU, and what FlashInfer would compile and load is written down instead. Prints one JSON object a source and op:
what was asked for, what `refgrid_groundtruth.kernels` foretold, and how the call ended.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any
from unittest import mock

CAPABILITY = (9, 0)
os.environ["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
PROPERTIES = {
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 140 * 2**30,
    "shared_memory_per_multiprocessor": 228 * 2**10,
    "shared_memory_per_block_optin": 227 * 2**10,
    "warp_size": 32,
    "L2_cache_size": 50 * 2**20,
    "name": "NVIDIA H200",
}


class StandIn(mock.MagicMock):
    """What is given for a module: all its functions are there, and numbers that they give compare as small."""

    def _get_child_mock(self, **options: Any) -> Any:
        child = super()._get_child_mock(**options)
        child.__gt__ = child.__ge__ = lambda *_: False
        child.__lt__ = child.__le__ = lambda *_: True
        return child


def pretend(torch: Any) -> None:
    """What FlashInfer asks torch about the GPU before it loads a module."""
    gpu = SimpleNamespace(**PROPERTIES)
    answers = {
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_capability": CAPABILITY,
        "get_device_name": gpu.name,
        "get_device_properties": gpu,
        "is_current_stream_capturing": False,
        "current_stream": StandIn(),
        "device": StandIn(),
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, _answer=answer, **__: _answer)
    plain = torch.empty

    def pageable(*given: Any, **options: Any) -> Any:
        return plain(*given, **{**options, "pin_memory": False})

    torch.empty = pageable
    torch.Tensor.is_cuda = property(lambda _: True)


def listen() -> list[str]:
    """Every module that is asked for from now on; a stand-in is given for it."""
    jit, asked = importlib.import_module("flashinfer.jit.core"), []
    for name, module in list(sys.modules.items()):
        if name.startswith("flashinfer"):
            for function, answer in {"get_compute_capability": CAPABILITY, "get_seed_and_offset": (0, 0)}.items():
                if hasattr(module, function):
                    setattr(module, function, lambda *_, _answer=answer, **__: _answer)

    def build_and_load(spec: Any) -> Any:
        asked.append(spec.name)
        module = StandIn()
        module.plan_with_staged_workspace_bytes.return_value = ([], 0)
        return module

    jit.JitSpec.build_and_load = build_and_load
    return asked


def forget() -> None:
    """FlashInfer asks for a module once a process."""
    for each in gc.get_objects():
        if isinstance(each, functools._lru_cache_wrapper) and str(each.__module__).startswith("flashinfer"):
            each.cache_clear()


def call(source: Any, op: str, groundtruth: Any) -> str:
    """Let the adapter run; how it ended, since a stand-in computes nothing that could be right."""
    function = groundtruth._bound(source, op)
    try:
        function(**importlib.import_module("refgrid_groundtruth.selftest").answer(op)[0])
    except Exception as error:  # noqa: BLE001 - the reader judges
        return f"{type(error).__name__}: {str(error).strip()[:200]}"
    return "came through"


def main() -> None:
    """One line a source and op."""
    import torch

    pretend(torch)
    import refgrid_groundtruth as groundtruth
    from refgrid_groundtruth.kernels import kernels
    from refgrid_groundtruth.table import FAMILY

    importlib.import_module("flashinfer")
    wanted = sys.argv[1:]
    for source in (each for each in groundtruth.SOURCES if each.library == "flashinfer"):
        for op in (op for op in source.ops if not wanted or op in wanted):
            try:
                found = kernels(source.name, op, {})
            except groundtruth.Unavailable as told:
                print(json.dumps([source.name, op, str(told)]), flush=True)  # noqa: T201
                continue
            importlib.import_module(f"refgrid_groundtruth.flashinfer.{FAMILY[op]}")
            forget()
            asked = listen()
            ended = call(source, op, groundtruth)
            foretold = sorted(module.name for module in found.ahead)
            print(json.dumps([source.name, op, foretold, sorted(set(asked)), ended]), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()

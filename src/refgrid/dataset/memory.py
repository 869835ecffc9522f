"""What a case takes of a device's memory, and what is there for the worker that runs it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from functools import cache

from refgrid.dataset.definition import Definition, TensorSpec

_BITS = {"float64": 64, "int64": 64, "float32": 32, "int32": 32, "float16": 16, "bfloat16": 16, "int16": 16}
_UNITS = {"B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# Weights and other inputs are held twice, as drawn and as handed out; outputs three times: of the reference, of a truth
# and of the reference once more, for determinism.
_INPUTS, _OUTPUTS = 2, 3
# What a reference takes while it works: less than four times its inputs and outputs, and no more than this for a large
# cache. tests/test_peak_memory.py holds them to it.
_WORK, _MOST_WORK = 4, 2 * 2**30
_WIDER = 4  # bfloat16 as float64
# Of a GPU's memory, be it all or what others leave, what the CUDA context and the libraries' workspaces leave.
_SHARE_OF_GPU = 0.9

# Set by the lease of a GPU: how many workers have one on it.
WORKERS_ON_GPU = "REFGRID_WORKERS_ON_GPU"


def weights(definition: Definition) -> dict[str, float]:
    """The inputs that are the same at every size, and their bytes."""
    constants = {name: axis.value for name, axis in definition.axes.items() if axis.value is not None}
    specs = definition.inputs.items()
    return {name: _bytes(spec, constants) for name, spec in specs if definition.is_weight(name)}


def weight_bytes(definition: Definition) -> float:
    """Bytes of all of them."""
    return sum(weights(definition).values())


def growing_bytes(definition: Definition, axes: Mapping[str, int]) -> float:
    """Bytes of all inputs and outputs but the weights, at these values of the axes."""
    return sum(_growing(definition, axes))


def bytes_needed(definition: Definition, axes: Mapping[str, int]) -> float:
    """What proving a case takes at its peak, weights included; an estimate from above."""
    inputs, outputs = _growing(definition, axes)
    work = min(_WORK * (inputs + outputs), _MOST_WORK)
    return _INPUTS * (weight_bytes(definition) + inputs) + _OUTPUTS * outputs + work


def bytes_laid_out_anew(definition: Definition, axes: Mapping[str, int]) -> float:
    """The same where a library lays the weights out once more, in the order that its kernels want."""
    return bytes_needed(definition, axes) + weight_bytes(definition)


def bytes_in_float64(definition: Definition, axes: Mapping[str, int]) -> float:
    """The same for a formula that computes everything in float64."""
    return _WIDER * bytes_needed(definition, axes)


def bytes_free(device: str, limit: float = math.inf) -> float:
    """What this worker may take of the device's memory: its share, what is free of it, and at most `limit`."""
    return min(limit, _free_on_gpu() if device == "cuda" else _free_on_cpu())


def share_of_gpu(total: float, workers: int) -> float:
    """What each of the workers on a GPU with so much memory may take."""
    return _SHARE_OF_GPU * total / workers


def told_lack(definition: Definition, free: float) -> str:
    """Why a definition cannot run here at any size."""
    held = weight_bytes(definition)
    if _INPUTS * held > free:
        what = f"weights of {told_bytes(held)} are held {_INPUTS} times, as drawn and as handed out"
    else:
        what = "the smallest size that the constraints allow does not fit"
    return f"{what}; {told_bytes(free)} are free for this worker"


def told_lack_for(source: str, definition: Definition, axes: Mapping[str, int], free: float) -> str:
    """Why a library cannot be asked, which lays weights out anew."""
    weights, wanted = weight_bytes(definition), bytes_laid_out_anew(definition, axes)
    copies = f"{source} may lay weights of {told_bytes(weights)} out once more, beside two copies here"
    return f"{copies}: {told_bytes(wanted)} in all; {told_bytes(free)} are free for this worker"


def parse_bytes(text: str) -> float:
    """2GiB, 512MiB or a plain number of bytes; raises ValueError for anything else."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]iB|B)?", text.strip(), re.IGNORECASE)
    if not found or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no amount of memory: should be such as 2GiB, 512MiB or 1000000")
    return float(found[1]) * _UNITS[(found[2] or "B").upper()]


def told_bytes(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _growing(definition: Definition, axes: Mapping[str, int]) -> tuple[float, float]:
    sums = [
        sum(_bytes(spec, axes) for name, spec in specs.items() if not definition.is_weight(name))
        for specs in (definition.inputs, definition.outputs)
    ]
    return sums[0], sums[1]


def _bytes(spec: TensorSpec, axes: Mapping[str, int]) -> float:
    return math.prod(axes[axis] for axis in spec.shape or ()) * _BITS.get(spec.dtype, 8) / 8


def _free_on_gpu() -> float:
    """Workers share a GPU evenly; what this one's allocator holds is free for its next case, but for workspaces."""
    import torch

    free, total = torch.cuda.mem_get_info()
    workers = int(os.environ.get(WORKERS_ON_GPU, "1"))
    return min(share_of_gpu(total, workers), share_of_gpu(free + torch.cuda.memory_reserved(), 1))


@cache
def _free_on_cpu() -> float:
    """As it was before the first case: what this worker itself holds later is its own to use again."""
    import psutil

    return float(psutil.virtual_memory().available) / _workers()


def _workers() -> int:
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

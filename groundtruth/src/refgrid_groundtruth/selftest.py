"""Proof before use: the device is what a source needs, and a tiny case of each op gives the answer known by hand.

A self-test goes through the very adapter that will serve, so a changed argument order, layout, unit or default of the
library is an error of the source here, not a mismatch of a reference later.
"""

from __future__ import annotations

import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from refgrid_groundtruth import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth import Adapter, Source

    Case = tuple[dict[str, Any], dict[str, torch.Tensor]]  # inputs and constants, expected outputs

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
    given, expected = CASES[op]()
    result = adapter(**{name: _on(device, value) for name, value in given.items()})
    if not result or not set(result) <= set(expected):
        raise Unavailable("error", f"self-test failed: got {sorted(result)} but should be {sorted(expected)}")
    for name, tensor in result.items():
        _demand_equal(name, tensor.cpu(), expected[name])


def _on(device: str, value: Any) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def _demand_equal(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    form = [(list(tensor.shape), str(tensor.dtype)) for tensor in (actual, expected)]
    if form[0] != form[1]:
        raise Unavailable("error", f"self-test failed: got {name} of {form[0]} but should be {form[1]}")
    error = (actual.double() - expected.double()).abs()
    wrong = ~(error <= TOLERANCE * expected.double().abs().clamp(min=1)) & (actual != expected)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        got, should = actual[at].item(), expected[at].item()
        reason = f"self-test failed: got {name}{list(at)} = {got:.6g} but should be {should:.6g}"
        raise Unavailable("error", f"{reason} ({int(wrong.sum())} of {wrong.numel()} wrong)")


# Rows of equal values v have the mean square v^2; with eps 7 the root of 9 + 7 is 4 and every answer a quarter of v.
EPS = 7.0
WEIGHT = torch.tensor([1.0, 2.0, -0.5, 4.0], dtype=torch.bfloat16).repeat(32)


def _rows(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bfloat16)[:, None].repeat(1, len(WEIGHT))


def _rmsnorm() -> Case:
    given = {"hidden_states": _rows(3, -3, 0), "weight": WEIGHT.clone(), "eps": EPS}
    return given, {"output": _rows(0.75, -0.75, 0) * WEIGHT}


def _fused_add_rmsnorm() -> Case:
    given = {
        "hidden_states": _rows(1, -5, 2),
        "residual": _rows(2, 2, -2),
        "weight": WEIGHT.clone(),
        "eps": EPS,
    }
    return given, {"output": _rows(0.75, -0.75, 0) * WEIGHT, "residual_out": _rows(3, -3, 0)}


def _gemm() -> Case:
    """Integers from -2 to 2, [8, 16] by [24, 16]; the sums are done on Python's integers."""
    a = [[(i + k) % 3 - 1 for k in range(16)] for i in range(8)]
    b = [[(2 * j + k) % 5 - 2 for k in range(16)] for j in range(24)]
    c = [[sum(x * y for x, y in zip(row, column, strict=True)) for column in b] for row in a]
    half = torch.float16
    return {"A": torch.tensor(a, dtype=half), "B": torch.tensor(b, dtype=half)}, {"C": torch.tensor(c, dtype=half)}


# Two sequences on pages of 4 slots: 6 keys on pages 3 and 1, out of order, and 3 keys on page 2. Page 0 is unused.
PAGES, KEYS, PAGE_SIZE, QO_HEADS, KV_HEADS, HEAD_DIM = ((3, 1), (2,)), (6, 3), 4, 8, 2, 128
SM_SCALE = 0.125


def _value(sequence: int, position: int, head: int) -> float:
    return 2.0 * position + 16 * head + 5 * sequence


def _cache() -> dict[str, torch.Tensor]:
    """k is 1 in the first component and v tells where it lies; what no sequence uses is NaN."""
    k = torch.full((4, PAGE_SIZE, KV_HEADS, HEAD_DIM), math.nan, dtype=torch.bfloat16)
    v = k.clone()
    for sequence, (pages, keys) in enumerate(zip(PAGES, KEYS, strict=True)):
        for position in range(keys):
            slot = pages[position // PAGE_SIZE], position % PAGE_SIZE
            k[slot] = torch.eye(1, HEAD_DIM)
            for head in range(KV_HEADS):
                v[slot][head] = _value(sequence, position, head)
    return {"k_cache": k, "v_cache": v}


def _attention(rows: list[tuple[int, int]], **indptr: torch.Tensor) -> Case:
    """For each row its sequence and how many keys it sees.

    Head h scores each key SM_SCALE * h, so the weights are uniform: the output is the mean of the values seen and lse =
    log2(keys) + SM_SCALE * h * log2(e).
    """
    q = torch.zeros(len(rows), QO_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    q[:, :, 0] = torch.arange(QO_HEADS)
    group = QO_HEADS // KV_HEADS
    mean = [[sum(_value(s, j, h // group) for j in range(n)) / n for h in range(QO_HEADS)] for s, n in rows]
    lse = [[math.log2(n) + SM_SCALE * h * math.log2(math.e) for h in range(QO_HEADS)] for _, n in rows]
    table = {
        "kv_indptr": torch.tensor([0, 2, 3], dtype=torch.int32),
        "kv_indices": torch.tensor([page for pages in PAGES for page in pages], dtype=torch.int32),
        "kv_last_page_len": torch.tensor([2, 3], dtype=torch.int32),
    }
    given = {"q": q, **_cache(), **indptr, **table, "sm_scale": SM_SCALE}
    output = torch.tensor(mean)[:, :, None].expand(-1, -1, HEAD_DIM).to(torch.bfloat16)
    return given, {"output": output, "lse": torch.tensor(lse, dtype=torch.float32)}


def _gqa_paged_decode() -> Case:
    return _attention([(0, 6), (1, 3)])


def _gqa_paged_prefill_causal() -> Case:
    """Three queries at the end of the first sequence, one at the end of the second."""
    indptr = torch.tensor([0, 3, 4], dtype=torch.int32)
    return _attention([(0, 4), (0, 5), (0, 6), (1, 3)], qo_indptr=indptr)


CASES: dict[str, Callable[[], Case]] = {
    "rmsnorm": _rmsnorm,
    "fused_add_rmsnorm": _fused_add_rmsnorm,
    "gemm": _gemm,
    "gqa_paged_decode": _gqa_paged_decode,
    "gqa_paged_prefill_causal": _gqa_paged_prefill_causal,
}

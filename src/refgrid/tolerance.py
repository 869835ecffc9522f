"""Tolerances: what `match` means, one table by op, dtype and output; the most specific row wins.

`|actual - expected| <= atol + rtol * |expected|`, elementwise, for at least `required_matched_ratio` of the elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Tolerance:
    """atol in the output's unit, rtol relative to the ground truth, and the share of elements that must be within."""

    atol: float
    rtol: float
    required_matched_ratio: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} = {value}, but should be finite and at least 0")
        if not 0 < self.required_matched_ratio <= 1:
            raise ValueError(f"required_matched_ratio = {self.required_matched_ratio}, but should be in (0, 1]")


EXACT = Tolerance(0.0, 0.0)

# The published guideline of the reference-test documents: the starting point, and the ceiling of every later row.
_GUIDELINE = "tolerance guideline of flashinfer-bench's add-reference-tests document"

# (op, dtype, output) -> tolerance and where it comes from; "*" stands for any.
TABLE: dict[tuple[str, str, str], tuple[Tolerance, str]] = {
    ("*", "float64", "*"): (Tolerance(1e-7, 1e-7), "FlashInfer's default check for float64"),
    ("*", "float32", "*"): (Tolerance(1e-5, 1e-5), _GUIDELINE),
    ("*", "float16", "*"): (Tolerance(1e-3, 1e-3), _GUIDELINE),
    ("*", "bfloat16", "*"): (Tolerance(8e-3, 1e-2), _GUIDELINE),
    ("*", "float8_e4m3fn", "*"): (Tolerance(1e-1, 2e-1, 0.85), _GUIDELINE),
    ("*", "float8_e5m2", "*"): (Tolerance(1e-1, 2e-1, 0.85), "as float8_e4m3fn; the guideline names no e5m2"),
    ("*", "float4_e2m1", "*"): (Tolerance(1e-1, 2e-1, 0.85), f"{_GUIDELINE}, where it is called nvfp4"),
    **{
        ("*", dtype, "*"): (EXACT, "whole numbers are right or wrong")
        for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool")
    },
}


@dataclass(frozen=True)
class TruthLimit:
    """Where a truth is itself less precise than the table asks; patterns, and the measurement behind the bound."""

    truth: str  # a source and its device, "torch on cpu"
    op: str
    dtype: str  # of the output
    output: str
    tolerance: Tolerance
    measured: str


TRUTH_LIMITS: tuple[TruthLimit, ...] = (
    TruthLimit(
        "torch on cpu",
        "gqa_*",
        "float32",
        "lse",
        Tolerance(2e-4, 1e-5),
        "the CPU flash kernel's exponential is good to one unit of a 16-bit float only (pytorch/pytorch#151441): "
        "largest error against float64 8.4e-5 (base 2) over 300 draws of bfloat16 with 1 to 129 keys, torch 2.13.0",
    ),
    TruthLimit(
        "flashinfer-fa2 on cuda",
        "gqa_*",
        "float32",
        "lse",
        Tolerance(3e-3, 1e-5),
        "fa2 sums probabilities already rounded to the dtype (m16k16_rowsum_f16f16f32 in prefill.cuh), which moves the "
        "lse of bfloat16 by up to 2**-9 * log2(e) = 2.8e-3; largest seen 2.5e-3 over 479 workloads, 0.6.12 on an H200; "
        "the other FlashInfer kernels stay below 4e-6 there",
    ),
    TruthLimit(
        "transformers on *",
        "gqa_*",
        "bfloat16",
        "output",
        Tolerance(4e-2, 1e-2),
        "eager attention rounds scores and weights to the dtype: largest error against float64 2.7e-2, 2.5e-2 beyond "
        "rtol, over 400 draws of bfloat16 with 1 to 129 keys, transformers 5.23.0 on a CPU",
    ),
)


def tolerance_for(op: str, dtype: str, output: str, truth: str = "") -> Tolerance:
    """The tolerance of one output of one op in one dtype; `truth` is a source and its device, as "torch on cpu".

    Raises ValueError for a dtype without a row, naming those that have one.
    """
    for limit in TRUTH_LIMITS:
        if all(map(fnmatchcase, (truth, op, dtype, output), (limit.truth, limit.op, limit.dtype, limit.output))):
            return limit.tolerance
    for key in ((op, dtype, output), (op, dtype, "*"), ("*", dtype, output), ("*", dtype, "*")):
        if key in TABLE:
            return TABLE[key][0]
    known = sorted({dtype for _, dtype, _ in TABLE})
    raise ValueError(f"dtype {dtype!r} has no tolerance; dtypes that have one: {', '.join(known)}")


def tolerance_of(bound: float) -> Tolerance:
    """One number for both, atol = rtol = bound, for every element: what `--tolerance` asks for in place of the table.

    Raises ValueError for a bound that is negative or not finite.
    """
    return Tolerance(bound, bound)


def looser(one: Tolerance, other: Tolerance) -> Tolerance:
    """What two truths that are compared with each other may differ by: the bound of the less precise."""
    ratio = min(one.required_matched_ratio, other.required_matched_ratio)
    return Tolerance(max(one.atol, other.atol), max(one.rtol, other.rtol), ratio)

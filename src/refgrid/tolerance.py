"""Tolerances: what `match` means, one table by op, dtype and output; the most specific row wins.

`|actual - expected| <= atol + rtol * |expected|`, elementwise, for at least `required_matched_ratio` of the elements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


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
    ("*", "float8_e5m2", "*"): (Tolerance(1e-1, 2e-1, 0.85), _GUIDELINE),
    ("*", "float4_e2m1", "*"): (Tolerance(1e-1, 2e-1, 0.85), _GUIDELINE),
    **{
        ("*", dtype, "*"): (EXACT, "whole numbers are right or wrong")
        for dtype in ("int64", "int32", "int16", "int8", "uint8", "bool")
    },
}


def tolerance_for(op: str, dtype: str, output: str) -> Tolerance:
    """The tolerance of one output of one op in one dtype.

    Raises ValueError for a dtype without a row, naming those that have one.
    """
    for key in ((op, dtype, output), (op, dtype, "*"), ("*", dtype, output), ("*", dtype, "*")):
        if key in TABLE:
            return TABLE[key][0]
    known = sorted({dtype for _, dtype, _ in TABLE})
    raise ValueError(f"dtype {dtype!r} has no tolerance; dtypes that have one: {', '.join(known)}")

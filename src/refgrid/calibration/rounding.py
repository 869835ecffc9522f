"""The words of a measurement, and how much a dtype rounds: what no tolerance of two rounded numbers can be below."""

from __future__ import annotations

from collections.abc import Mapping

# Who is measured besides the sources, and against what.
REFERENCE, FORMULA, FLOAT64 = "reference", "same formula in the library's dtype", "float64"

# Half the distance of 1 to the next number: the largest relative error of a rounding.
UNIT: Mapping[str, float] = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def least_rtol(dtype: str) -> float:
    """Two roundings and a quarter of them more, for numbers that lie just above a power of two."""
    return 2.5 * UNIT[dtype]

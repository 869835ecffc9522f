"""What a comparison measures, element by element in Python's own numbers: slow, and as its documentation says it."""

from __future__ import annotations

import math
from typing import Any

import torch

from refgrid.proving.tolerance import Tolerance


def naive_compare(actual: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> dict[str, Any]:
    """Every number of the Comparison of two floating tensors, by name; `worst` as (index, error)."""
    indices = [tuple(index) for index in torch.ones(actual.shape).nonzero().tolist()]
    pairs = [(a, e) for a, e in zip(actual.double().flatten().tolist(), expected.double().flatten().tolist())]  # noqa: B905
    finite = [(a, e) for a, e in pairs if math.isfinite(a) and math.isfinite(e)]
    errors = [_error(a, e) for a, e in pairs]
    allowed = [tolerance.atol + tolerance.rtol * abs(e) if math.isfinite(e) else 0.0 for _, e in pairs]
    bad = [error > bound for error, bound in zip(errors, allowed, strict=True)]
    differences = [abs(a - e) for a, e in finite]
    relative = [abs(a - e) / abs(e) for a, e in finite if e != 0]
    mismatches = sum(error == math.inf for error in errors)
    order = sorted(range(len(pairs)), key=lambda i: (not bad[i], -errors[i], i))[:5]
    return {
        "count": len(pairs),
        "matched_ratio": 1 - sum(bad) / len(bad),
        "max_abs_error": max(errors),
        "mean_abs_error": _mean(differences),
        "max_rel_error": math.inf if mismatches else max(relative, default=math.nan),
        "mean_rel_error": _mean(relative),
        "cosine": _cosine(finite),
        "mse": _mean([difference**2 for difference in differences]),
        "headroom": max(_share(error, bound) for error, bound in zip(errors, allowed, strict=True)),
        "nonfinite_mismatches": mismatches,
        "needed_atol": max([0.0, *(_needed(a, e, tolerance.rtol) for a, e in pairs)]),
        "worst": [(indices[i], errors[i]) for i in order],
    }


def _error(a: float, e: float) -> float:
    if math.isfinite(a) and math.isfinite(e):
        return abs(a - e)
    return 0.0 if a == e or (math.isnan(a) and math.isnan(e)) else math.inf


def _needed(a: float, e: float, rtol: float) -> float:
    error = _error(a, e)
    return error - rtol * abs(e) if math.isfinite(e) else error


def _share(error: float, bound: float) -> float:
    if error == 0:
        return 0.0
    return error / bound if bound else math.inf


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _cosine(pairs: list[tuple[float, float]]) -> float:
    if not pairs:
        return math.nan
    a, e = (math.sqrt(math.fsum(pair[side] ** 2 for pair in pairs)) for side in (0, 1))
    if a == 0 or e == 0:
        return 1.0 if a == e else 0.0
    return max(-1.0, min(1.0, math.fsum(x * y for x, y in pairs) / a / e))

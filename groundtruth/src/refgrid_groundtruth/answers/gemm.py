"""A product of small integers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from refgrid_groundtruth.selftest import Answer


def _gemm() -> Answer:
    """Integers from -2 to 2, [8, 16] by [24, 16]; the sums are done on Python's integers."""
    a = [[(i + k) % 3 - 1 for k in range(16)] for i in range(8)]
    b = [[(2 * j + k) % 5 - 2 for k in range(16)] for j in range(24)]
    c = [[sum(x * y for x, y in zip(row, column, strict=True)) for column in b] for row in a]
    half = torch.float16
    return {"A": torch.tensor(a, dtype=half), "B": torch.tensor(b, dtype=half)}, {"C": torch.tensor(c, dtype=half)}


CASES: dict[str, Callable[[], Answer]] = {
    "gemm": _gemm,
}

"""Whether the GPU was as fast as it can be while it was timed: a matrix product before and after each pass says so.

Ways that take turns are slowed alike by whoever else is on the GPU, or by what holds back its clock: their ratios look
sound, and no TFLOP/s is what it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from grouped_bench.report import Row
from grouped_bench.timing import in_turns

_SIZE = 8192  # of the matrices: 1.1 TFLOP, 1.6 ms on an H200
_ROUNDS = 64  # the first of them while an idle GPU's clock goes up
_LEAST = 0.8  # of the best


class SlowGpu(RuntimeError):
    """What was timed does not count."""


class Pace:
    """Of one device, beside the best of its kind in earlier rows."""

    def __init__(self, earlier: Sequence[Row], device: torch.device, name: str) -> None:
        self._device = device
        best = (row["matmul_tflops"] for row in earlier if "matmul_tflops" in row and row["device"] == name)
        self._best = max(best, default=0.0)

    def kept(self, work: Callable[[], Iterable[Row]]) -> list[Row]:
        """The rows, with the slower of the two products; of a CPU, which times nothing of interest, as they are.

        Raises SlowGpu where that is below four fifths of the best.
        """
        if self._device.type != "cuda":
            return list(work())
        before = product_tflops(self._device)
        rows, after = list(work()), product_tflops(self._device)
        found = min(before, after)
        self._best = max(self._best, before, after)
        if found < _LEAST * self._best:
            told = f"a product of matrices ran at {before:.0f} TFLOP/s before and at {after:.0f} after"
            raise SlowGpu(f"{told}, but should at {_LEAST * self._best:.0f}: best was {self._best:.0f}")
        return [{**row, "matmul_tflops": float(f"{found:.5g}")} for row in rows]


def product_tflops(device: torch.device) -> float:
    """Of a bfloat16 product, in the median of a few."""
    left, right = torch.randn(2, _SIZE, _SIZE, device=device, dtype=torch.bfloat16)
    times = in_turns({"product": lambda: left @ right}, device, _ROUNDS)["product"]
    return float(2e-9 * _SIZE**3 / times.median)

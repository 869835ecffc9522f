"""What SGLang compiles, all of it at the first call: Triton on the GPU, its own CUDA kernels and DeepGEMM with nvcc.

Read in 0.5.15. The kernels of sgl_kernel come compiled, and its samplers are plain torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refgrid_groundtruth.kernels import Kernels
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from refgrid_groundtruth.kernels import Call
    from refgrid_groundtruth.table import Source

COMPILERS = {
    "gqa": "Triton",
    "gdn": "Triton",
    "mamba": "Triton",
    "moe": "Triton, and nvcc for its router",
    "rope": "nvcc",
}


def kernels(_: Source, op: str, __: Sequence[Call]) -> Kernels:
    """Nothing ahead."""
    if op == "dsa_topk_indexer_fp8":
        return Kernels(at_first_call="DeepGEMM")
    return Kernels(at_first_call=COMPILERS.get(FAMILY[op], ""))

"""What the Triton kernels compile to for an H200: no GPU is needed for that, Triton's wheel brings the tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

# All of the table, head_dim 128 in float16 as well, and tiles that are more than the registers of so few warps hold.
TOLD = """
from refgrid_solutions.grouped_attention.backends.triton.resources import main
main([])
main(["--head-dim=128", "--dtype=fp16"])
main(["--kernel=forward", "--head-dim=128", "--tiles=128,128,4,2"])
"""
# A processor's own memory, in bytes, less what it keeps for itself; and its registers.
SHARED_MEMORY = 227 * 1024
REGISTERS = 64 * 1024


def compiled(cache: Path) -> list[dict[str, Any]]:
    """The module's answers; in a process of its own, as kernels are either interpreted or compiled in one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    told = subprocess.run([sys.executable, "-c", TOLD], env=environment, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    return [json.loads(line) for line in told.stdout.splitlines()]


def test_every_kernel_of_the_table_fits_and_a_tile_that_is_too_large_is_noticed(tmp_path: Path) -> None:
    """One test, as a process for each would take longer to begin than to compile."""
    *kernels, too_large = compiled(tmp_path)

    assert [(kernel["kernel"], kernel["head_dim"], kernel["dtype"]) for kernel in kernels] == [
        (name, head_dim, dtype)
        for head_dim, dtype in ((64, "bf16"), (128, "bf16"), (128, "fp16"))
        for name in ("forward", "of_rows", "of_keys")
    ]
    for kernel in kernels:
        assert kernel["products"] > 0, f"{kernel}: the tensor cores of a warp group have nothing to do"
        assert kernel["loads"] > 0, f"{kernel}: the copy engine has nothing to do"
        assert kernel["shared_memory"] <= SHARED_MEMORY, kernel
        assert kernel["registers"] * 32 * kernel["tiles"]["warps"] <= REGISTERS, kernel
        assert kernel["from_registers"] > 0, f"{kernel}: no product is seen that reads registers"
        assert not kernel["overwritten"], f"{kernel}: a product that is not yet waited for reads what is written"
        assert not kernel["warnings"], kernel
        assert kernel["in_loops"] == 0, f"{kernel}: a loop reaches for local memory"

    assert too_large["spills"] > 0
    assert too_large["in_loops"] > 0
    assert "serialized" in too_large["warnings"]

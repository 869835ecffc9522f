"""What the Triton kernels compile to for an H200: no GPU is needed for that, Triton's wheel brings the tools."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("Triton has no wheels but for Linux", allow_module_level=True)

MODULE = "refgrid_solutions.grouped_attention.backends.triton.resources"
# A processor's own memory, in bytes, less what it keeps for itself.
SHARED_MEMORY = 227 * 1024
# Only these loops may reach for local memory: five products for 128 columns are more than registers hold.
SPILLING = {("of_keys, reduced", 128)}

Ask = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Ask:
    """The module's answers; in a process of its own, as kernels are either interpreted or compiled in one."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def asked(*arguments: str) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", MODULE, *arguments]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert told.returncode == 0, told.stderr
        return [json.loads(line) for line in told.stdout.splitlines()]

    return asked


def test_every_kernel_of_the_table_fits(ask: Ask) -> None:
    kernels = ask()

    assert {(kernel["kernel"], kernel["head_dim"]) for kernel in kernels} == {
        (name, head_dim) for name in ("forward", "of_rows", "of_keys", "of_keys, reduced") for head_dim in (64, 128)
    }
    for kernel in kernels:
        assert kernel["products"] > 0, f"{kernel}: the tensor cores of a warp group have nothing to do"
        assert kernel["loads"] > 0, f"{kernel}: the copy engine has nothing to do"
        assert (kernel["reductions"] > 0) == ("reduced" in kernel["kernel"]), kernel
        assert kernel["shared_memory"] * kernel["tiles"]["resident"] <= SHARED_MEMORY, kernel
        assert kernel["registers"] * 32 * kernel["tiles"]["warps"] * kernel["tiles"]["resident"] <= 65536, kernel
        assert not kernel["warnings"], kernel
        spilling = (kernel["kernel"], kernel["head_dim"]) in SPILLING
        assert (kernel["in_loops"] > 0) == spilling, kernel


def test_a_tile_that_is_too_large_is_noticed(ask: Ask) -> None:
    (kernel,) = ask("--kernel=forward", "--head-dim=128", "--tiles=128,128,4,2,1")

    assert kernel["spills"] > 0
    assert kernel["in_loops"] > 0
    assert "serialized" in kernel["warnings"]

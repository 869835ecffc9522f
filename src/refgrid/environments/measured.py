"""The environment as measured: from package metadata, the driver and the toolkit, without importing torch.

Importing torch costs seconds and freezes the choice of GPU, so nothing here does.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic.dataclasses import dataclass as checked


@checked(frozen=True)
class Environment:
    """What a run ran on. None means: not there. Versions are those found, never those asked for."""

    name: str
    device: str
    python: str
    platform: str
    torch: str | None
    cuda: str | None
    toolkit: str | None
    driver: str | None
    gpu: str | None
    gpu_count: int
    libraries: dict[str, str]

    @property
    def title(self) -> str:
        """How a column is called: the environment and the machine kind."""
        return f"{self.name} on {self.machine}"

    @property
    def machine(self) -> str:
        """The kind of machine that cases ran on: a GPU that was only there beside the CPU is none."""
        return self.gpu if self.device == "cuda" and self.gpu else "CPU"


def measure(name: str, device: str, distributions: Iterable[str]) -> Environment:
    """Look at this interpreter and machine; `device` is where the cases run, "cpu" or "cuda"."""
    driver, names = _nvidia()
    libraries = {distribution: found for distribution in distributions if (found := _version(distribution))}
    return Environment(
        name=name,
        device=device,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}".lower(),
        torch=_version("torch"),
        cuda=_torch_cuda(),
        toolkit=_toolkit(),
        driver=driver,
        gpu=names[0] if names else None,
        gpu_count=len(names),
        libraries=libraries,
    )


def gpus() -> list[str]:
    """Names of the GPUs that the driver shows; none without a driver."""
    return _nvidia()[1]


def driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    return _nvidia()[0]


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _torch_cuda() -> str | None:
    """The CUDA runtime that torch was built for: the literal `cuda` in torch/version.py."""
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin).parent / "version.py" if spec and spec.origin else None
    if file is None or not file.exists():
        return None
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        if isinstance(target, ast.Name) and target.id == "cuda" and isinstance(node, ast.AnnAssign):
            return ast.literal_eval(node.value) if node.value else None
    return None


def _toolkit() -> str | None:
    """The release of the nvcc that a JIT compiler would find."""
    nvcc = _nvcc()
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release ([\d.]+), V([\d.]+)", told)
    return release.group(2) if release else None


def _nvcc() -> str | None:
    """Where FlashInfer and torch look: in CUDA_HOME, on the PATH, then in the usual folder."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=str(Path(home, "bin")))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def _nvidia() -> tuple[str | None, list[str]]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None, []  # no driver on this machine
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return str(pynvml.nvmlSystemGetDriverVersion()), [str(pynvml.nvmlDeviceGetName(h)) for h in handles]
    finally:
        pynvml.nvmlShutdown()

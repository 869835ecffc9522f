"""Which NVIDIA driver a CUDA needs, and which CUDA the driver of this machine has. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

# CUDA's major release -> the driver of Linux that all its minor releases run on, with what that driver lacks left out.
# NVIDIA, CUDA Toolkit Release Notes, "CUDA Toolkit and Minimum Required Driver Version for CUDA Minor Version
# Compatibility": https://docs.nvidia.com/cuda/cuda-toolkit-release-notes/
DRIVER_FLOOR: Mapping[int, str] = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def driver_fault(cuda: str, driver: str | None, driver_cuda: str | None = None) -> str:
    """Why a driver cannot serve a CUDA; empty where it can, or where there is no driver at all.

    `driver_cuda` is the CUDA of the driver library that is loaded: a compatibility package brings a later one than the
    kernel's driver has, and then that counts.
    """
    floor = DRIVER_FLOOR.get(Version(cuda).major)
    if driver is None or floor is None or _served_by(driver_cuda, cuda):
        return ""
    try:
        too_old = Version(driver) < Version(floor)
    except InvalidVersion:
        return f"driver {driver!r} is no version, so nobody can say whether it serves CUDA {cuda}, which needs {floor}"
    return f"driver {driver} is too old for CUDA {cuda}, which needs {floor}" if too_old else ""


def driver_cuda() -> str | None:
    """The newest CUDA of the driver library that programs on this machine load; None without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        found = int(pynvml.nvmlSystemGetCudaDriverVersion_v2())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return f"{found // 1000}.{found % 1000 // 10}"


def _served_by(driver_cuda: str | None, cuda: str) -> bool:
    return driver_cuda is not None and Version(driver_cuda).major >= Version(cuda).major

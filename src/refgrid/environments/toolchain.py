"""What compiling kernels needs of a machine: a compiler, for which GPUs, and the headers of CUDA's libraries."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

# For which GPUs FlashInfer compiles, read when it is imported; its modules lie in a folder of that name.
ARCHITECTURES = "FLASHINFER_CUDA_ARCH_LIST"
_ARCHITECTURE = re.compile(r"\d+\.\d[af]?")
# Where gcc looks after all that a command names: what a toolkit has itself is found there first.
_HEADERS = "CPLUS_INCLUDE_PATH"
_LIBRARY_HEADERS = ("cublasLt.h", "curand.h", "nvrtc.h")


class ToolchainError(Exception):
    """Nothing can be compiled here: what is missing, and how to name it."""


def choose_architectures(asked: str) -> str:
    """The GPUs to compile for: those asked for, else those set for FlashInfer, else this machine's.

    Sets what FlashInfer reads. Raises ToolchainError when nobody says, or for what is no compute capability.
    """
    told = asked or os.environ.get(ARCHITECTURES, "") or " ".join(sorted(set(_of_gpus())))
    if not told:
        raise ToolchainError(f"no GPU here says what to compile for: give --arch, such as 9.0a, or set {ARCHITECTURES}")
    for part in told.split():
        if not _ARCHITECTURE.fullmatch(part):
            raise ToolchainError(f"{part!r} is no compute capability: should be such as 8.9, 9.0a or 10.0a")
    os.environ[ARCHITECTURES] = " ".join(told.split())
    return os.environ[ARCHITECTURES]


def nvcc() -> Path:
    """The compiler that FlashInfer will start. Raises ToolchainError when there is none."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home, "bin"))) if home else shutil.which("nvcc")
    found = found or (None if home else shutil.which("nvcc", path="/usr/local/cuda/bin"))
    if found is None:
        where = f"CUDA_HOME is {home}" if home else "neither on the PATH nor in /usr/local/cuda/bin"
        raise ToolchainError(f"no-compiler: there is no nvcc ({where}); set CUDA_HOME to a CUDA toolkit, which has one")
    return Path(found)


def add_headers(compiler: Path) -> list[Path]:
    """Let the compiler find headers that the toolkit lacks where the wheels beside torch have them; gives the folders.

    A toolkit without cuBLAS and cuRAND is common: they are packages of their own.
    """
    toolkit = compiler.resolve().parent.parent
    there = [toolkit / "include", *toolkit.glob("targets/*/include")]
    lacking = {name for name in _LIBRARY_HEADERS if not any((folder / name).exists() for folder in there)}
    added = [folder for folder in _wheel_folders() if any((folder / name).exists() for name in lacking)]
    before = os.environ.get(_HEADERS, "")
    known = [*filter(None, before.split(os.pathsep)), *map(str, added)]
    if added:
        os.environ[_HEADERS] = os.pathsep.join(dict.fromkeys(known))
    return added


def _wheel_folders() -> Iterator[Path]:
    """CUDA 13's wheels share one folder, those of CUDA 12 have one a library."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        yield from sorted(Path(root).glob("*/include"))


def _of_gpus() -> Iterator[str]:
    """As FlashInfer names them: with what only this GPU has, but left to itself where that depends on the toolkit."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return
    try:
        for index in range(pynvml.nvmlDeviceGetCount()):
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(index))
            yield f"{major}.{minor}{'a' if 9 <= major < 12 else ''}"
    finally:
        pynvml.nvmlShutdown()

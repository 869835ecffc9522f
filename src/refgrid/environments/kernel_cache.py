"""FlashInfer's cache of compiled kernels, and of which torch and CUDA it is.

FlashInfer keys its cache by its own version and the GPU's architecture; torch, CUDA and Python are not in it. So the
first run that uses a folder writes down whose kernels will be in it, and a later run of another set is stopped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from refgrid.environments.measured import Environment

STAMP = "refgrid-environment.json"


def flashinfer_base() -> Path | None:
    """The folder that this environment alone uses; None where FlashInfer would use the one of the home folder."""
    told = os.environ.get("FLASHINFER_WORKSPACE_BASE")
    return Path(told) if told else None


def tvm_ffi_folder() -> Path:
    """Where modules lie that libraries build by tvm-ffi, such as SGLang's."""
    return Path(os.environ.get("TVM_FFI_CACHE_DIR") or "~/.cache/tvm-ffi").expanduser()


def fault(base: Path | None, environment: Environment) -> tuple[bool, str]:
    """Whether what is cached is known to be another set's, and what is to be said of it; empty for nothing."""
    folder = (base or Path.home()) / ".cache" / "flashinfer"
    if not next(folder.rglob("*.so"), None):
        return False, ""
    if base is None:
        return False, f"{folder} holds kernels that every torch and CUDA share; FLASHINFER_WORKSPACE_BASE parts them"
    compiled_for = _stamp(base)
    if compiled_for is None:
        return False, f"{folder} holds kernels compiled for a torch and a CUDA that nobody wrote down"
    other = {name: value for name, value in _identity(environment).items() if compiled_for.get(name) != value}
    was = ", ".join(f"{name} {compiled_for.get(name)}" for name in other)
    now = ", ".join(f"{name} {value}" for name, value in other.items())
    return bool(other), f"{folder} holds kernels compiled for {was}, but here is {now}: delete it" if other else ""


def claim(base: Path | None, environment: Environment) -> None:
    """Write down whose kernels a folder that holds none yet will hold."""
    if base is None or next((base / ".cache" / "flashinfer").rglob("*.so"), None):
        return
    base.mkdir(parents=True, exist_ok=True)
    unfinished = base / f".{STAMP}-{os.getpid()}"
    unfinished.write_text(json.dumps(_identity(environment)), encoding="utf-8")
    unfinished.replace(base / STAMP)


def _stamp(base: Path) -> dict[str, str | None] | None:
    try:
        found = json.loads((base / STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _identity(environment: Environment) -> dict[str, str | None]:
    """What compiled kernels depend on besides what FlashInfer's own key holds."""
    python = ".".join(environment.python.split(".")[:2])
    return {"torch": environment.torch, "CUDA": environment.cuda, "nvcc": environment.toolkit, "Python": python}

"""What an environment turned out to be, held against what was asked for: before any test, on any machine.

It looks at package metadata, the toolkit, the driver and the caches, with the environment's own interpreter, and
imports what is pinned, though not in this process. An error would make the whole column untrue and stops the run; a
finding is recorded in its head.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from refgrid.environments import kernel_cache
from refgrid.environments.declared import LOCAL, EnvironmentSpec, declared_as, load_environments
from refgrid.environments.driver import driver_cuda, driver_fault
from refgrid.environments.imports import Imports, modules_of
from refgrid.environments.measured import Environment

# How a command or a run ends that is not on the environment that its name says.
EXIT_CODE = 3
# A distribution's name says for which CUDA it is: nvidia-cublas-cu12, cupy-cuda13x.
_CUDA_IN_NAME = re.compile(r"-cu(?:da)?(\d\d)x?$")
# From CUDA 13 on NVIDIA's names do not say it; of these the version is that of CUDA.
_CUDA_AS_VERSION = re.compile(
    r"cuda-(toolkit|bindings|python)|nvidia-(cuda-(runtime|nvcc|nvrtc|cupti|cccl)|nvjitlink|nvtx)"
)
# Parts of FlashInfer that hold compiled kernels of exactly one FlashInfer.
_PREBUILT = ("flashinfer-cubin", "flashinfer-jit-cache")


@dataclass(frozen=True)
class AuditFinding:
    """One line about an environment: an `error` stops the run, a `finding` is recorded."""

    severity: Literal["error", "finding"]
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def audit_named(table: Path, environment: Environment, imports: Imports | None = None) -> list[AuditFinding]:
    """Audit the interpreter that runs this as the declared environment of that name.

    One that claims to be none has nothing to be held against. Raises EnvironmentsError when the table cannot be used,
    or declares no such environment.
    """
    declared = load_environments(table) if table.exists() else None
    if environment.name == LOCAL:
        return []
    if declared is None:
        return [AuditFinding("finding", f"not audited: there is no {table.parent.name}/{table.name} to declare it")]
    spec = declared_as(environment.name, declared)
    lock = table.parent / "locks" / spec.lock
    return audit(spec, lock.read_text(encoding="utf-8") if lock.exists() else "", environment, imports)


def audit(
    spec: EnvironmentSpec, lock: str, environment: Environment, imports: Imports | None = None
) -> list[AuditFinding]:
    """Every error and finding, errors first; `lock` is the text of the environment's lock.

    With `imports` what is pinned is imported too, unless an error stops the run already.
    """
    got = Installed(environment)
    checks = (
        _pins,
        _python,
        _locked,
        _incomplete,
        _torch_cuda,
        _driver,
        _majors,
        _toolkit,
        _compiler,
        _prebuilt,
        _cached,
    )
    found = [each for check in checks for each in check(spec, lock, got)]
    if imports and not any(each.severity == "error" for each in found):
        found += _imported(spec, got, imports)
    return sorted(dict.fromkeys(found), key=lambda each: each.severity)


class Installed:
    """What the interpreter finds: of a distribution that is there twice, the first on its path counts."""

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.distributions: dict[str, Distribution] = {}
        for each in distributions():
            if name := each.metadata["Name"]:
                self.distributions.setdefault(canonicalize_name(name), each)

    def version(self, name: str) -> str | None:
        """The version of a distribution; None where it is missing."""
        found = self.distributions.get(canonicalize_name(name))
        return found.version if found else None


def same_version(asked: str, got: str) -> bool:
    """Whether a version is the one asked for; a build label such as +cu130 counts only where both have one."""
    wanted, found = Version(asked), Version(got)
    return wanted.public == found.public and (not wanted.local or not found.local or wanted.local == found.local)


def _pins(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    """The libraries that the column is named after: another one makes its whole evidence untrue."""
    for pin in (*spec.pins, *spec.machine):
        requirement = Requirement(pin)
        fault = _differs(requirement, got)
        missing = got.version(requirement.name) is None
        if fault:
            yield AuditFinding("finding" if missing and requirement.name != "torch" else "error", fault)


def _python(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    asked = spec.python if spec.python.startswith(">=") else f"=={spec.python}.*"
    if not SpecifierSet(asked).contains(got.environment.python, prereleases=True):
        yield AuditFinding("error", f"this is Python {got.environment.python}, but {spec.python} is asked for")


def _locked(spec: EnvironmentSpec, lock: str, got: Installed) -> Iterator[AuditFinding]:
    """The rest of the lock."""
    told = {canonicalize_name(Requirement(pin).name) for pin in (*spec.pins, *spec.machine)}
    for requirement in _requirements(lock):
        fault = "" if canonicalize_name(requirement.name) in told else _differs(requirement, got)
        if fault:
            yield AuditFinding("finding", fault)


def _requirements(lock: str) -> Iterator[Requirement]:
    lines = (line.rstrip("\\ ") for line in lock.splitlines() if line[:1].isalnum())
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate():
            yield requirement


def _differs(requirement: Requirement, got: Installed) -> str:
    (asked,) = (specifier.version for specifier in requirement.specifier)
    found = got.version(requirement.name)
    if found is None:
        return f"{requirement.name} {asked} is asked for and missing"
    return "" if same_version(asked, found) else f"{requirement.name} {found} is here, but {asked} is asked for"


def _incomplete(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    """Files that a library should have by its own list and has not: a broken install, or a trimmed wheel."""
    for name in (Requirement(pin).name for pin in spec.pins):
        found = got.distributions.get(canonicalize_name(name))
        gone = sorted(_gone(found)) if found else []
        if found and gone:
            more = f" and {len(gone) - 3} more files" if len(gone) > 3 else ""
            yield AuditFinding("finding", f"{name} {found.version} is here without {', '.join(gone[:3])}{more}")


def _gone(distribution: Distribution) -> Iterator[str]:
    """Scripts are laid out by each installer in its own way, and bytecode comes and goes.

    `Distribution.files` is no help: from Python 3.12 on it leaves out what is not there.
    """
    folder = str(distribution.locate_file(""))
    for file, *_ in csv.reader((distribution.read_text("RECORD") or "").splitlines()):
        elsewhere = file.startswith(("..", "/")) or file.partition("/")[0].endswith(".data") or file.endswith(".pyc")
        # torch has fifteen thousand files: of names, several times as fast as of Paths
        if not elsewhere and not os.path.exists(os.path.join(folder, file)):  # noqa: PTH110, PTH118
            yield file


def _imported(spec: EnvironmentSpec, got: Installed, imports: Imports) -> Iterator[AuditFinding]:
    """A library of the right version may still be broken."""
    names = {canonicalize_name(Requirement(pin).name) for pin in (*spec.machine, *spec.pins)}
    brought = {module: each for name, each in got.distributions.items() if name in names for module in modules_of(each)}
    for module, fault in imports.faults(spec.name, sorted(brought)).items():
        by = brought[module]
        yield AuditFinding("finding", f"{by.metadata['Name']} {by.version}: import of {module} {fault}")


def _torch_cuda(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    here, torch = got.environment.cuda, got.environment.torch
    if torch is None or here == spec.cuda:
        return
    if spec.cuda is None:
        yield AuditFinding("finding", f"torch {torch} is a build for CUDA {here}, but {spec.name} asks for a CPU build")
    else:
        built = f"for CUDA {here}" if here else "without CUDA"
        yield AuditFinding("error", f"torch {torch} is built {built}, but {spec.name} asks for CUDA {spec.cuda}")


def _driver(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    """Too old a driver stops nobody who runs on the CPU."""
    cuda, here = spec.cuda or got.environment.cuda, got.environment.driver
    if cuda is None or here is None:
        return
    on_gpu = got.environment.device == "cuda"
    if fault := driver_fault(cuda, here, driver_cuda()):
        yield AuditFinding("error" if on_gpu else "finding", fault)
    elif fault := driver_fault(cuda, here):
        yield AuditFinding("finding", f"{fault}; a compatibility package with CUDA {driver_cuda()} stands in for it")


def _majors(_: EnvironmentSpec, __: str, got: Installed) -> Iterator[AuditFinding]:
    """Libraries of two CUDA majors in one process: which of them is loaded is a matter of luck."""
    majors: dict[int, list[str]] = defaultdict(list)
    for name, distribution in sorted(got.distributions.items()):
        if major := _cuda_major(name, distribution.version):
            majors[major].append(f"{name} {distribution.version}")
    if len(majors) > 1:
        told = [f"{_some(names)} of CUDA {major}" for major, names in sorted(majors.items())]
        yield AuditFinding("finding", f"CUDA majors are mixed: {'; '.join(told)}")


def _cuda_major(name: str, version: str) -> int | None:
    if said := _CUDA_IN_NAME.search(name):
        return int(said[1])
    return Version(version).major if _CUDA_AS_VERSION.fullmatch(name) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _toolkit(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    """Kernels that are compiled here belong to the toolkit's CUDA, and run beside torch's, on the driver's."""
    nvcc, runtime = got.environment.toolkit, got.environment.cuda
    if spec.cuda is None or nvcc is None:
        return
    release = _release(nvcc)
    if runtime and release != runtime:
        yield AuditFinding("finding", f"nvcc is of CUDA {nvcc}, but torch's runtime is of CUDA {runtime}")
    newest = driver_cuda()
    if newest and Version(release) > Version(newest):
        yield AuditFinding("finding", f"nvcc is of CUDA {nvcc}: the driver's CUDA {newest} refuses PTX of it")


def _release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _compiler(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    """FlashInfer compiles what it is asked for, unless all of it came compiled."""
    if spec.cuda is None or not got.version("flashinfer-python") or got.version("flashinfer-jit-cache"):
        return
    cxx = os.environ.get("CXX", "c++")
    lacking = [] if got.environment.toolkit else ["nvcc (CUDA_HOME, PATH or /usr/local/cuda)"]
    lacking += [tool for tool in (cxx, "ninja") if not shutil.which(tool)]
    if lacking:
        told = " and ".join(lacking)
        yield AuditFinding("finding", f"no {told}: FlashInfer cannot compile its kernels here")


def _prebuilt(_: EnvironmentSpec, __: str, got: Installed) -> Iterator[AuditFinding]:
    flashinfer = got.version("flashinfer-python")
    for name in _PREBUILT:
        found = got.version(name)
        if flashinfer and found and Version(found).public != Version(flashinfer).public:
            yield AuditFinding("finding", f"{name} {found} holds kernels of another FlashInfer than {flashinfer}")
        label = Version(found).local if found else None
        cuda = (got.environment.cuda or "").replace(".", "")
        if label and cuda and label.startswith("cu") and label != f"cu{cuda}":
            yield AuditFinding("finding", f"{name} {found} holds kernels of another CUDA than {got.environment.cuda}")


def _cached(spec: EnvironmentSpec, _: str, got: Installed) -> Iterator[AuditFinding]:
    if spec.cuda is None or not got.version("flashinfer-python"):
        return
    foreign, told = kernel_cache.fault(kernel_cache.flashinfer_base(), got.environment)
    if told:
        yield AuditFinding("error" if foreign else "finding", told)

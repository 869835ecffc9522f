"""The declared environments, `ci/environments.toml`: read, checked, and refused with the reason. Imports no torch.

What an environment turned out to be is measured by `measured`; this module knows only what was asked for.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# The CUDA of PyPI's Linux build of each torch: one torch, one CUDA.
CUDA_OF_TORCH: Mapping[str, str] = {
    "2.5": "12.4",
    "2.6": "12.4",
    "2.7": "12.6",
    "2.8": "12.8",
    "2.9": "12.8",
    "2.10": "12.8",
    "2.11": "13.0",
    "2.12": "13.0",
    "2.13": "13.0",
    "2.14": "13.0",
    "2.15": "13.2",
}


LOCAL = "local"  # the column of an interpreter that claims to be no declared environment


class EnvironmentsError(ValueError):
    """The table of environments cannot be used: file, entry, field and reason."""


def _exact(pin: str) -> str:
    try:
        requirement = Requirement(pin)
    except InvalidRequirement as error:
        raise ValueError(f"{pin!r} is no requirement: {error}") from error
    specifiers = list(requirement.specifier)
    if len(specifiers) != 1 or specifiers[0].operator != "==" or specifiers[0].version.endswith("*"):
        raise ValueError(f"{pin!r} is no exact pin, name==version")
    if requirement.marker or requirement.url:
        raise ValueError(f"{pin!r} has a marker or an address; a pin holds on every machine")
    return pin


def _once_each(pins: tuple[str, ...]) -> tuple[str, ...]:
    _unique([_distribution(pin) for pin in pins], "is pinned twice")
    return pins


Pin = Annotated[str, AfterValidator(_exact)]
Pins = Annotated[tuple[Pin, ...], AfterValidator(_once_each)]


class EnvironmentSpec(BaseModel):
    """One version set as declared; the file's head says what each field means."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"))

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+([.-][a-z0-9]+)*$")]
    kind: Literal["venv", "overlay"]
    python: Annotated[str, Field(pattern=r"^(3\.\d+|>=3\.\d+,<3\.\d+)$")]
    pins: Annotated[Pins, Field(min_length=1)]
    cuda: Annotated[str | None, Field(pattern=r"^\d+\.\d+$")] = None
    machine: Pins = ()
    without: tuple[str, ...] = ()
    omit: tuple[str, ...] = ()
    origin: Annotated[str, Field(min_length=1)]
    exclude_newer: date
    note: str = ""

    @property
    def torch(self) -> Version:
        """The torch asked for, of the pins or of the machine. Raises ValueError where neither says."""
        for pin in (*self.pins, *self.machine):
            if _distribution(pin) == "torch":
                return Version(pin.partition("==")[2])
        raise ValueError(f"no torch is pinned in {'machine' if self.kind == 'overlay' else 'pins'}")

    @property
    def lock(self) -> str:
        """File name of the lock, beside the table in `locks/`."""
        return f"{self.name}.txt"

    @property
    def unresolvable(self) -> str:
        """File name, beside the locks, of the resolver's words where there can be no lock any more."""
        return f"{self.name}.unresolvable.txt"

    @property
    def group(self) -> str | None:
        """All environments of one CUDA, by the name that PyTorch's builds give it: "cu130"; None without CUDA."""
        return f"cu{self.cuda.replace('.', '')}" if self.cuda else None

    @model_validator(mode="after")
    def _fits_its_kind(self) -> EnvironmentSpec:
        if self.kind == "venv" and self.machine:
            raise ValueError("machine belongs to kind overlay; a venv brings all it needs in pins")
        if self.kind == "venv" and self.omit:
            raise ValueError("omit belongs to kind overlay; a venv's wheels are installed whole")
        if self.kind == "overlay" and not self.machine:
            raise ValueError("kind overlay needs machine: what is laid over what")
        if self.cuda and self.python.startswith(">="):
            raise ValueError(f"python {self.python!r} must be one version, X.Y: compiled kernels belong to one")
        return self

    @model_validator(mode="after")
    def _has_a_cuda_that_exists(self) -> EnvironmentSpec:
        torch = self.torch
        if self.kind == "venv" and torch.local:
            raise ValueError(f"torch {torch} is not on PyPI, whose builds have no +{torch.local}")
        if self.cuda:
            _check_cuda(torch, self.cuda)
        return self

    @model_validator(mode="after")
    def _is_called_as_its_cuda(self) -> EnvironmentSpec:
        begins = self.name.partition("-")[0]
        if self.kind == "venv" and self.group and begins != self.group:
            raise ValueError(f"a name for CUDA {self.cuda} begins with {self.group}-: tests-{self.group} runs them all")
        if not self.cuda and re.fullmatch(r"cu\d+", begins):
            raise ValueError(f"cuda is missing: the name begins with {begins}-, as those of a CUDA do")
        return self


class Instrument(BaseModel):
    """Distributions that only the instrument uses, and their date, the same in every environment."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-"))

    exclude_newer: date
    packages: tuple[Annotated[str, AfterValidator(canonicalize_name)], ...]


class EnvironmentTable(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    environment: tuple[EnvironmentSpec, ...]
    instrument: Instrument | None = None

    @property
    def by_name(self) -> dict[str, EnvironmentSpec]:
        """Every environment, in the file's order."""
        return {spec.name: spec for spec in self.environment}

    @model_validator(mode="after")
    def _has_unique_names(self) -> EnvironmentTable:
        if not self.environment:
            raise ValueError("environment: none is declared")
        _unique([spec.name for spec in self.environment], "is declared twice")
        groups = [spec.group for spec in self.environment if spec.kind == "venv"]
        for spec in self.environment:
            if spec.name == spec.group and groups.count(spec.group) > 1:
                raise ValueError(f"{spec.name!r} means all environments of CUDA {spec.cuda}: add whose set it is")
        return self


def load_environments(file: Path) -> dict[str, EnvironmentSpec]:
    """Every declared environment by name, in the file's order; raises EnvironmentsError as `load_table` does."""
    return load_table(file).by_name


def with_sessions(root: Path) -> frozenset[str]:
    """Names of the environments that a checkout declares, each with its session; none where it has no table."""
    try:
        return frozenset(load_environments(root / "ci" / "environments.toml"))
    except EnvironmentsError:
        return frozenset()


def load_table(file: Path) -> EnvironmentTable:
    """The whole table.

    Raises EnvironmentsError naming file, entry, field and reason.
    """
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))
        return EnvironmentTable.model_validate(entries)
    except FileNotFoundError as error:
        where = f"a checkout of refgrid has one; this folder is {Path.cwd()}"
        raise EnvironmentsError(f"{file}: no such table of environments: {where}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EnvironmentsError(f"{file}: cannot be read: {error}") from error
    except ValidationError as error:
        raise EnvironmentsError("\n".join(f"{file}: {_told(each, entries)}" for each in error.errors())) from error


def chosen(names: Iterable[str], declared: Mapping[str, EnvironmentSpec]) -> list[EnvironmentSpec]:
    """The environments of these names, in the table's order; a CUDA such as cu128 names all of its environments.

    Raises EnvironmentsError for a name that is not declared, with those that are.
    """
    wanted = set(names)
    groups = {spec.group for spec in declared.values() if spec.group}
    if unknown := sorted(wanted - set(declared) - groups):
        legal = ", ".join([*declared, *sorted(groups - set(declared))])
        raise EnvironmentsError(f"no environment is called {', '.join(map(repr, unknown))}; legal values: {legal}")
    return [spec for spec in declared.values() if spec.name in wanted or spec.group in wanted]


def declared_as(name: str, declared: Mapping[str, EnvironmentSpec]) -> EnvironmentSpec:
    """The environment of exactly this name; raises EnvironmentsError for any other, with those that are declared."""
    if name in declared:
        return declared[name]
    if of_cuda := [spec.name for spec in declared.values() if spec.group == name]:
        raise EnvironmentsError(f"{name!r} is a CUDA and no environment; give one of {', '.join(of_cuda)}")
    raise EnvironmentsError(f"no environment is called {name!r}; legal values: {', '.join(declared)}")


def resolvers_words(file: Path) -> str:
    """Why a set cannot be resolved any more: the file without its head, on one line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return " ".join(line.strip() for line in lines if not line.startswith("#"))


def _check_cuda(torch: Version, cuda: str) -> None:
    release = f"{torch.major}.{torch.minor}"
    if torch.local:
        if torch.local != f"cu{cuda.replace('.', '')}":
            raise ValueError(f"cuda {cuda} contradicts torch {torch}")
    elif release not in CUDA_OF_TORCH:
        known = f"{next(iter(CUDA_OF_TORCH))} to {list(CUDA_OF_TORCH)[-1]}"
        raise ValueError(f"which CUDA PyPI's torch {torch} has is not known; the table in {__name__} has {known}")
    elif CUDA_OF_TORCH[release] != cuda:
        raise ValueError(f"PyPI's torch {torch} is built for CUDA {CUDA_OF_TORCH[release]}, never for {cuda}")


def _distribution(pin: str) -> str:
    return canonicalize_name(Requirement(pin).name)


def _unique(names: Sequence[str], fault: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name!r} {fault}")


def _told(error: Mapping[str, Any], entries: Mapping[str, Any]) -> str:
    """One line: which entry, which field, what is wrong."""
    where = list(error["loc"])
    if len(where) > 1 and isinstance(where[1], int):
        entry = entries["environment"][where[1]]
        where[:2] = [f"environment {entry['name']!r}" if "name" in entry else f"environment number {where[1] + 1}"]
    reason = str(error["msg"]).removeprefix("Value error, ")
    return ": ".join([*map(str, where), reason])

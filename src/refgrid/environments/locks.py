"""Locks of the environments as files: what one holds, and whether it is what the table asks for. Needs no network.

A lock is a requirements file with hashes; below each pin stands the day on which its newest file was uploaded, so that
anybody can see that no library is newer than the set it belongs to.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from refgrid.environments.declared import EnvironmentSpec, EnvironmentTable, Instrument, load_table

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_LINE = re.compile(
    r"#.*|    # uploaded [\d-]{10}|[a-z0-9-]+==[\w.!+]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?"
)
_PIN = re.compile(r"^([a-z0-9-]+)==([^\s\\]+)")
_UPLOADED = "    # uploaded "
_HASH = "    --hash=sha256:"


@dataclass(frozen=True)
class Locked:
    """One pin of a lock: the same distribution may have several, each for some Pythons."""

    name: str
    version: str
    hashes: int
    uploaded: date | None


def locked(text: str) -> Iterator[Locked]:
    """Every pin of a lock, with how many hashes stand below it and its day."""
    for block in re.split(r"\n(?=[a-z0-9])", text):
        if pin := _PIN.match(block):
            day = re.search(rf"^{_UPLOADED}(.*)$", block, re.MULTILINE)
            yield Locked(pin[1], pin[2], block.count(_HASH), date.fromisoformat(day[1]) if day else None)


def head(spec: EnvironmentSpec) -> str:
    """The first line of a lock, and of the file that stands in its place: how to make it, and of what it was made.

    A pin that was taken away leaves a lock in which every other is met: the digest of all is how that is seen.
    """
    asked = "\n".join([*sorted(spec.pins), "without", *sorted(spec.without)])
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return f"nox -s lock -- {spec.name} (as of {spec.exclude_newer}, Python {spec.python}, pins {digest})"


def lock_faults(table: Path, project: Path) -> list[str]:
    """What is wrong with the locks beside a table, one line each; empty when all are current.

    Raises EnvironmentsError when the table itself cannot be used.
    """
    declared, needs = load_table(table), tomllib.loads(project.read_text(encoding="utf-8"))
    folder = table.parent / "locks"
    known = {name for spec in declared.environment for name in (spec.lock, spec.unresolvable)}
    found = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    faults = [f"{folder / name}: belongs to no environment of {table}" for name in found if name not in known]
    for spec in declared.environment:
        faults += [f"{fault}; nox -s lock -- {spec.name}" for fault in _faults(folder, spec, declared, needs)]
    return faults


def _faults(folder: Path, spec: EnvironmentSpec, table: EnvironmentTable, project: Mapping[str, Any]) -> Iterator[str]:
    """The one file that an environment has, and what is wrong with it."""
    lock, words = folder / spec.lock, folder / spec.unresolvable
    if lock.exists() and words.exists():
        yield f"{words}: stands beside {lock.name}, but an environment either has a lock or cannot have one"
    elif words.exists():
        yield from (f"{words}: {fault}" for fault in words_faults(spec, words.read_text(encoding="utf-8")))
    elif lock.exists():
        text = lock.read_text(encoding="utf-8")
        yield from (f"{lock}: {fault}" for fault in faults_of(spec, text, project, table.instrument))
    else:
        yield f"{lock}: is missing"


def words_faults(spec: EnvironmentSpec, text: str) -> Iterator[str]:
    """What is wrong with the file of an environment that cannot be resolved any more."""
    if head(spec) not in text:
        yield f"is not of: {head(spec)}"
    if not re.search(r"^# tried \d{4}-\d\d-\d\d$", text, re.MULTILINE):
        yield "does not say when it was tried: # tried YYYY-MM-DD"
    if not any(line.strip() and not line.startswith("#") for line in text.splitlines()):
        yield "does not say why: the resolver's words are missing"
    yield from (f"names a machine or an address: {line!r}" for line in text.splitlines() if "://" in line)


def faults_of(
    spec: EnvironmentSpec, text: str, project: Mapping[str, Any], instrument: Instrument | None = None
) -> Iterator[str]:
    """What is stale or wrong in the text of one lock."""
    pins = list(locked(text))
    if head(spec) not in text:
        yield f"is not of: {head(spec)}"
    yield from (f"is no pin, hash or comment: {line!r}" for line in strange_lines(text))
    yield from _unmet(_wanted(spec, project), pins)
    yield from (f"{name} does not belong there" for name in _unwanted(spec, {pin.name for pin in pins}))
    yield from (f"{pin.name}=={pin.version} has no hash" for pin in pins if not pin.hashes)
    yield from _late(spec, pins, instrument)


def strange_lines(text: str) -> list[str]:
    """Lines of a lock that are neither comment, exact pin, hash nor day: an index, a path, an address."""
    return [line for line in text.splitlines() if not _LINE.fullmatch(line) or "/" in line]


def _wanted(spec: EnvironmentSpec, project: Mapping[str, Any]) -> Iterator[Requirement]:
    """The pins, and in a venv what the instrument needs; a CPU build of torch is installed apart."""
    yield from (Requirement(pin) for pin in spec.pins if spec.cuda or not pin.startswith("torch=="))
    if spec.kind == "venv":
        lowest = spec.python.removeprefix(">=").partition(",")[0]
        needs = map(Requirement, [*project["project"]["dependencies"], *project["dependency-groups"]["test"]])
        yield from (need for need in needs if not need.marker or need.marker.evaluate({"python_version": lowest}))


def _unmet(wanted: Iterator[Requirement], pins: Collection[Locked]) -> Iterator[str]:
    for requirement in wanted:
        held = sorted({pin.version for pin in pins if pin.name == canonicalize_name(requirement.name)})
        if not held or not all(requirement.specifier.contains(version, prereleases=True) for version in held):
            yield f"{requirement} is not met by {held or 'nothing'}"


def _unwanted(spec: EnvironmentSpec, held: Collection[str]) -> Iterator[str]:
    unwanted = [*spec.without, *([] if spec.cuda else ["torch"])]
    return (name for name in unwanted if name in held)


def _late(spec: EnvironmentSpec, pins: Collection[Locked], instrument: Instrument | None) -> Iterator[str]:
    """Releases that did not exist yet when the set was made; the instrument's own have a date of their own."""
    for pin in pins:
        own = instrument if instrument and pin.name in instrument.packages else spec
        if pin.uploaded is None:
            yield f"{pin.name}=={pin.version} does not say when it was uploaded"
        elif pin.uploaded > own.exclude_newer:
            yield f"{pin.name}=={pin.version} is of {pin.uploaded}, newer than {own.exclude_newer}"

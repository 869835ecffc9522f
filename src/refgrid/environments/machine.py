"""What this machine can run: every declared environment, and where one cannot run here, what is missing for it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from refgrid.environments.audit import same_version
from refgrid.environments.declared import EnvironmentSpec, load_environments, resolvers_words
from refgrid.environments.driver import driver_cuda, driver_fault
from refgrid.environments.measured import driver, gpus
from refgrid.overlays.overlay import MANIFEST, OverlayError, Wheelhouse

_PROBE = """
import importlib.metadata, json, platform
found = {each.metadata["Name"].lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
print(json.dumps({"python": platform.python_version(), "distributions": found}))
"""


@dataclass(frozen=True)
class Machine:
    """The GPUs and their driver, and the interpreter over which an overlay would be laid, with all it has."""

    gpus: tuple[str, ...] = ()
    driver: str | None = None
    driver_cuda: str | None = None
    interpreter: str | None = None
    python: str = ""
    distributions: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Readiness:
    """One environment on one machine: `obstacle` says why it cannot run there and is empty where it can.

    `on_cpu`: a GPU is all that is missing, so who asks for it by name has it run on the CPU.
    """

    spec: EnvironmentSpec
    obstacle: str
    recorded: str | None
    on_cpu: bool = False

    @property
    def session(self) -> str:
        """What a person types: nox -s <this>."""
        return f"tests-{self.spec.name}"


def look_around() -> Machine:
    """What there is, as seen from outside the virtual environment that runs this."""
    interpreter = shutil.which("python3", path=outside_variables()["PATH"])
    told = json.loads(_asked(interpreter) or "{}") if interpreter else {}
    return Machine(tuple(gpus()), driver(), driver_cuda(), interpreter, **told)


def outside_variables() -> dict[str, str]:
    """The variables of this process without the virtual environment it runs in: what a person's shell has."""
    own = Path(sys.executable).parent
    parts = [part for part in os.environ.get("PATH", "").split(os.pathsep) if Path(part) != own]
    kept = {name: value for name, value in os.environ.items() if name not in {"VIRTUAL_ENV", "NOX_CURRENT_SESSION"}}
    return {**kept, "PATH": os.pathsep.join(parts)}


def readiness(table: Path, results: Path, machine: Machine) -> list[Readiness]:
    """Every declared environment in the table's order; raises EnvironmentsError as `load_environments` does."""
    recorded = dict(_recorded(results))
    locks = table.parent / "locks"
    return [
        Readiness(spec, obstacle(spec, machine, locks), recorded.get(name), _on_cpu(spec, machine, locks))
        for name, spec in load_environments(table).items()
    ]


def why_not_recorded(table: Path) -> dict[str, str]:
    """For every declared environment why it may have no records here: what stands in its way, or what to run.

    Raises EnvironmentsError as `load_environments` does.
    """
    machine, locks = look_around(), table.parent / "locks"
    found = {name: obstacle(spec, machine, locks) for name, spec in load_environments(table).items()}
    return {name: why or f"not run yet: nox -s tests-{name}" for name, why in found.items()}


def obstacle(spec: EnvironmentSpec, machine: Machine, locks: Path) -> str:
    """Why an environment cannot run on a machine; empty where it can."""
    words = locks / spec.unresolvable
    if words.exists():
        return f"unresolvable: {resolvers_words(words)}"
    lacking = _missing_beneath(spec, machine) or _not_carried(spec, locks.parents[1])
    if spec.cuda and not machine.gpus:
        rest = f", and {lacking}" if lacking else f"; on the CPU: nox -s tests-{spec.name}"
        return f"this machine shows no NVIDIA GPU{rest}"
    fault = driver_fault(spec.cuda, machine.driver, machine.driver_cuda) if spec.cuda else ""
    return fault or lacking


def _on_cpu(spec: EnvironmentSpec, machine: Machine, locks: Path) -> bool:
    """Whether a GPU is all that is missing."""
    shown = replace(machine, gpus=("any",), driver=None)
    return bool(spec.cuda) and not machine.gpus and not obstacle(spec, shown, locks)


def environment_of(file: Path) -> tuple[str, str] | None:
    """Environment and start of the first run in a file of records, from its first line alone."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
            header = json.loads(lines.readline())
        return header["environment"]["name"], header["started"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # no file of records; the matrix, which reads all of it, says what is wrong


def _recorded(results: Path) -> Iterator[tuple[str, str]]:
    """Each environment with records of this machine, and the start of its newest run."""
    return iter(sorted(found for file in results.glob("*.jsonl") if (found := environment_of(file))))


def _missing_beneath(spec: EnvironmentSpec, machine: Machine) -> str:
    """What an overlay should find in the machine's own interpreter and does not."""
    if spec.kind != "overlay":
        return ""
    found = machine.distributions or {}
    asked = [("Python", spec.python, ".".join(machine.python.split(".")[:2]) or "none")]
    for pin in spec.machine:
        name, _, version = pin.partition("==")
        asked.append((name, version, found.get(name.lower().replace("_", "-"), "none")))
    faults = [f"{name} {there} but should have {wanted}" for name, wanted, there in asked if not _same(wanted, there)]
    return f"{machine.interpreter or 'no python3 here'} has {' and '.join(faults)}" if faults else ""


def _not_carried(spec: EnvironmentSpec, root: Path) -> str:
    """An overlay is laid of a wheelhouse, which a session looks for in the same place."""
    if spec.kind != "overlay":
        return ""
    folder = root / os.environ.get("REFGRID_WHEELHOUSE", "wheelhouse")
    if not (folder / MANIFEST).exists():
        return f"{folder}: no wheelhouse is here; where there is an index: nox -s wheelhouse -- {spec.name}"
    try:
        Wheelhouse(folder).environment(spec.name)
    except OverlayError as error:
        return str(error)
    return ""


def _same(wanted: str, there: str) -> bool:
    """A machine's torch may leave its build label out of its metadata: 2.11.0 for 2.11.0+cu130."""
    return there != "none" and same_version(wanted, there)


@cache
def _asked(interpreter: str) -> str:
    """What another interpreter says about itself, asked once; nothing if it cannot be run."""
    done = subprocess.run([interpreter, "-c", _PROBE], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else ""

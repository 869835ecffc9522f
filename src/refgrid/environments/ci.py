"""Continuous integration: nox's list of sessions as a matrix of jobs, and the records of those jobs as one.

A job is an environment; where it runs is a set of runner labels that follows from the environment alone.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from refgrid.environments.declared import EnvironmentSpec
from refgrid.environments.machine import environment_of
from refgrid.records.record import RecordError, Run, record_paths, runs_of

HOSTED = ("ubuntu-24.04",)
SELF_HOSTED = ("self-hosted", "linux", "x64", "nvidia")
MOST_JOBS = 256  # GitHub starts no more from one matrix

_ARTIFACT = re.compile(r"records-(?P<environment>.+)-(?P<attempt>\d+)")


class PlanError(ValueError):
    """No sound plan can be made, or what is given as one is none."""


@dataclass(frozen=True)
class Job:
    """One environment on one runner; `session` is what a person would type after nox -s. An overlay needs wheels."""

    environment: str
    session: str
    device: str
    runs_on: tuple[str, ...]
    overlay: bool


def labels(spec: EnvironmentSpec) -> tuple[str, ...]:
    """The labels that a runner of this environment must have.

    cu130 promises a driver for CUDA 13.0 and its toolkit; torch-2.11.0-cu130 promises that torch in the runner's own
    Python, for overlays, and what their wheels require besides.
    """
    if spec.group is None:
        return HOSTED
    beneath = (f"torch-{str(spec.torch).replace('+', '-')}",) if spec.kind == "overlay" else ()
    return (*SELF_HOSTED, spec.group, *beneath)


def plan_jobs(listed: str, declared: Mapping[str, EnvironmentSpec], cannot: Iterable[str] = ()) -> list[Job]:
    """The jobs of all sessions in the text of `nox --list --json` that prove an environment.

    `cannot` names environments for which there is no lock any more. Raises PlanError for a text that is no such list,
    an environment without a session, an empty plan, and one that is larger than GitHub takes.
    """
    sessions = _sessions(listed)
    wanted = {name: spec for name, spec in declared.items() if name not in set(cannot)}
    if missing := [name for name in wanted if f"tests-{name}" not in sessions]:
        raise PlanError(f"nox lists no session tests-{missing[0]} ({len(missing)} of {len(wanted)} are missing)")
    jobs = [_job(name, spec) for name, spec in wanted.items()]
    if not jobs:
        raise PlanError("the plan is empty: no environment can run anywhere")
    if len(jobs) > MOST_JOBS:
        raise PlanError(f"the plan has {len(jobs)} jobs, GitHub takes at most {MOST_JOBS} of one matrix")
    return jobs


def _job(name: str, spec: EnvironmentSpec) -> Job:
    return Job(name, f"tests-{name}", "cuda" if spec.cuda else "cpu", labels(spec), spec.kind == "overlay")


def to_matrix(jobs: Sequence[Job]) -> str:
    """The plan as the JSON that `strategy.matrix` takes."""
    return json.dumps(
        {"include": [{name.replace("_", "-"): value for name, value in asdict(job).items()} for job in jobs]}
    )


def overlays(jobs: Iterable[Job]) -> str:
    """The environments of a plan whose wheels a job on another machine has to collect, as arguments of a command."""
    return " ".join(job.environment for job in jobs if job.overlay)


def planned_devices(matrix: str) -> dict[str, str]:
    """Environment -> device of a plan as `to_matrix` writes it; raises PlanError for anything else, or an empty one."""
    try:
        devices = {str(job["environment"]): str(job["device"]) for job in json.loads(matrix)["include"]}
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"is no plan: {matrix[:80]!r}; it should be what refgrid ci plan has printed") from error
    if not devices:
        raise PlanError("the plan is empty: no job was to run")
    return devices


def merge(planned: Mapping[str, str], artifacts: Path, into: Path) -> list[str]:
    """Copy the newest records of each environment from the downloaded artifacts; returns what is wrong, a line each.

    `planned` maps environments to devices; an artifact is a folder records-<environment>-<attempt>. Wrong is an
    environment without one or without a run, a run on another device, and a run with a planned case unaccounted for.
    """
    newest = _newest(artifacts)
    faults = [
        f"{name}: its artifact is in {artifacts}, but nobody planned it" for name in sorted({*newest} - {*planned})
    ]
    into.mkdir(parents=True, exist_ok=True)
    for name, device in planned.items():
        if name not in newest:
            faults.append(f"{name}: there is no artifact records-{name}-<attempt> in {artifacts}")
            continue
        try:
            files = _records(name, newest[name])
            faults += _faults(name, device, newest[name], [run for file in files for run in runs_of(file)])
        except RecordError as error:  # left out, so that the matrix of the others can be printed
            faults.append(f"{name}: {error}")
            continue
        for file in files:
            shutil.copyfile(file, into / file.name)
    return faults


def _sessions(listed: str) -> set[str]:
    try:
        return {str(entry["session"]) for entry in json.loads(listed)}
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"is no list of sessions: {listed[:80]!r}; it should come from nox --list --json") from error


def _newest(artifacts: Path) -> dict[str, Path]:
    """The folder of the last attempt of each environment: a job that is started again uploads once more."""
    found: dict[str, tuple[int, Path]] = {}
    for folder in artifacts.iterdir() if artifacts.is_dir() else ():
        if folder.is_dir() and (named := _ARTIFACT.fullmatch(folder.name)):
            turn = (int(named["attempt"]), folder)
            found[named["environment"]] = max(turn, found.get(named["environment"], turn))
    return {name: folder for name, (_, folder) in found.items()}


def _records(environment: str, folder: Path) -> list[Path]:
    """What an artifact holds of its own environment; whatever else lies there is not what the job was for."""
    found = (file for file in record_paths(folder) if file.is_file() and not file.is_symlink())
    return sorted(file for file in found if (told := environment_of(file)) and told[0] == environment)


def _faults(environment: str, device: str, folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    if not runs:
        yield f"{environment}: {folder.name} holds no run of it"
    for run in runs:
        yield from _gaps(f"{environment}: run {run.header.run}", device, run)


def _gaps(told: str, device: str, run: Run) -> Iterator[str]:
    planned, accounted = len(run.header.planned), len(run.outcomes)
    if run.header.environment.device != device:
        yield f"{told} ran on {run.header.environment.device}, but should have run on {device}"
    if not planned:
        yield f"{told} planned no case"
    elif not run.finished or planned != accounted:
        ended = "ended" if run.finished else "was killed"
        yield f"{told} {ended} with {accounted} of {planned} planned cases accounted for"

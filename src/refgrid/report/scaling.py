"""How long the same cases took on growing numbers of GPUs, and what of it was work: from the records of each run."""

from __future__ import annotations

import argparse
import shlex
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from refgrid.dataset.case import Case
from refgrid.records.record import Run, Verdict, lines_of, read_runs, verdict_counts

_LONGEST = 5  # workloads that are named


class TimingError(ValueError):
    """A run whose time says nothing: names it and why."""


@dataclass(frozen=True)
class Timing:
    """One run. `seconds` is the whole command's wall time, `start` how much of it passed before the cases were known.

    `seconds_are` says so where it is another time. `worker_seconds` are those of all workers together, by what records
    say that they were spent on; `beside` is what else the machine was busy with. What is None nobody has told.
    """

    gpus: int
    workers: int
    cores: int | None
    run: str
    started: str
    cases: int
    verdicts: dict[str, int]
    worker_seconds: dict[str, float]
    longest_workloads: dict[str, float]
    command: str
    environment: dict[str, str | None]
    seconds: float
    start: float | None
    seconds_are: str | None = None
    beside: str = ""

    @property
    def rate(self) -> float:
        """Cases a second of wall time."""
        return self.cases / self.seconds

    @property
    def busy(self) -> float:
        """The share of the workers' time, after the start, that went into cases."""
        return sum(self.worker_seconds.values()) / (self.workers * max(self.seconds - (self.start or 0), 1e-9))

    def efficiency(self, of: Timing) -> float:
        """How much of the growth in GPUs, against another run, is growth in cases a second."""
        return self.rate / of.rate * of.gpus / self.gpus

    def told(self, first: Timing) -> dict[str, Any]:
        """For a JSON file; the efficiency is that against the first run."""
        numbers = {"rate": round(self.rate, 1), "efficiency": round(self.efficiency(first), 2)}
        times = {"seconds": round(self.seconds, 1), "start": None if self.start is None else round(self.start, 1)}
        told = {**asdict(self), **times, **numbers, "busy": round(self.busy, 2)}
        told["beside"] = told.pop("beside") or None  # last, as it is the longest
        return {name: value for name, value in told.items() if value is not None}


def fault(each: Timing, first: Timing) -> str:
    """Why the time of a run means nothing; empty where it does not."""
    if red := [name for name in each.verdicts if Verdict(name).colour == "red"]:
        return f"{each.gpus} GPU(s): there are red cases ({', '.join(red)}), so the time means nothing"
    if number := each.verdicts.get("cached", 0):
        return f"{each.gpus} GPU(s): {number} cases are cached, so the time means nothing; give --no-cache"
    if each.verdicts != first.verdicts:
        return f"{each.gpus} GPU(s): ended in {each.verdicts}, but {first.gpus} in {first.verdicts}: not the same work"
    return ""


def timing(run: Run, gpus: int, workers: int, cores: int | None, seconds: float, start: float | None = None) -> Timing:
    """What a run was, and what its records say that was done in it."""
    here = run.header.environment
    return Timing(
        gpus=gpus,
        workers=workers,
        cores=cores,
        run=run.header.run,
        started=run.header.started,
        cases=len(run.header.planned),
        verdicts={verdict.value: number for verdict, number in verdict_counts(run.accounted()).items()},
        worker_seconds=_most((phase, each) for o in run.outcomes.values() for phase, each in o.seconds.items()),
        longest_workloads=_most(
            ((_workload(o.case), sum(o.seconds.values())) for o in run.outcomes.values()), _LONGEST
        ),
        command=run.header.command,
        environment={name: getattr(here, name) for name in ("name", "gpu", "driver", "torch", "cuda")},
        seconds=seconds,
        start=start,
    )


def timing_of_finished(folder: Path, seconds: float | None, cores_per_gpu: int | None) -> Timing:
    """The one run whose records a folder holds; `seconds` is its wall time, else from its plan to its last record.

    Raises TimingError where that is no whole run on GPUs, and RecordError where it cannot be read.
    """
    run = _only_run(folder)
    gpus = len({outcome.device for outcome in run.outcomes.values() if outcome.device})
    if not gpus:
        raise TimingError(f"{run.file}: no case of it ran on a GPU")
    cores = None if cores_per_gpu is None else cores_per_gpu * gpus
    found = timing(run, gpus, _workers(run.header.command, gpus), cores, seconds or _lasted(run))
    return found if seconds else replace(found, seconds_are="from the plan to the last record")


def _lasted(run: Run) -> float:
    """Records have no time of their own, but their file was last written with the last of them."""
    seconds = run.file.stat().st_mtime - datetime.fromisoformat(run.header.started).timestamp()
    if run.file.suffix == ".gz" or seconds <= 0:
        raise TimingError(f"{run.file}: was packed or copied, so how long its run took is to be told: FOLDER=SECONDS")
    return seconds


def _only_run(folder: Path) -> Run:
    runs = read_runs(folder)
    if len(runs) != 1:
        raise TimingError(f"{folder}: holds {len(runs)} runs, but should hold one, as --results FOLDER leaves it")
    if not runs[0].finished:
        raise TimingError(f"{runs[0].file}: its run has not ended")
    if any(line.kind == "resume" for line in lines_of(runs[0].file)):
        raise TimingError(f"{runs[0].file}: its run was killed and went on later; give --no-resume")
    return runs[0]


def _workers(command: str, gpus: int) -> int:
    """As the command of a run asked for: a number, or as many as -n auto starts."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-n", "--numprocesses", default="1")
    parser.add_argument("--workers-per-gpu", type=int, default=1)
    asked, _ = parser.parse_known_args(shlex.split(command)[1:])
    return int(asked.numprocesses) if asked.numprocesses.isdecimal() else gpus * int(asked.workers_per_gpu)


def _workload(case: Case) -> str:
    return f"{case.definition}{'~twin' if case.twin else ''}-{case.workload}"


def _most(told: Iterable[tuple[str, float]], count: int | None = None) -> dict[str, float]:
    """Seconds by name, the most first."""
    found: dict[str, float] = defaultdict(float)
    for name, seconds in told:
        found[name] += seconds
    ordered = sorted(found.items(), key=lambda each: -each[1])
    return {name: round(seconds, 1) for name, seconds in ordered[:count]}

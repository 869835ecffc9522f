"""`nox -s matrix`: every environment that this machine can run, each in a nox process of its own, one after another.

A red or broken environment stops no other. What counts afterwards is the matrix, which reads records; an environment
that failed and left none is named here, since no cell could show it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path

from refgrid.dataset.case import op_of
from refgrid.dataset.definition import DataSet
from refgrid.environments.declared import EnvironmentsError, EnvironmentSpec, chosen
from refgrid.environments.machine import Readiness, environment_of, outside_variables
from refgrid.running.budget import told_duration

# On a terminal the bar is enough: the matrix says what failed, and why.
QUIET = ("--progress", "--no-header", "--no-summary", "-q")

Start = Callable[[Sequence[str]], int]


@dataclass
class Campaign:
    """One pass over environments.

    `command` starts nox, `options` go to pytest, `results` is where records appear, `budget` is in seconds for all.
    """

    command: Sequence[str]
    options: Sequence[str]
    results: Path
    budget: int | None = None
    start: Start = field(default_factory=lambda: start_and_wait)
    clock: Callable[[], float] = time.monotonic

    def run(self, ready: Sequence[Readiness], say: Callable[[str], None]) -> list[str]:
        """Run all; returns what went wrong without leaving a record, one line each."""
        began = self.clock()
        unrecorded: list[str] = []
        for turn, each in enumerate(ready):
            left = None if self.budget is None else self.budget - (self.clock() - began)
            if left is not None and left < 1:
                say(f"{each.spec.name}: not begun, the budget of {told_duration(self.budget or 0)} was spent")
                continue
            share = None if left is None else left / (len(ready) - turn)
            unrecorded += self._run_one(each, share, say)
        return unrecorded

    def _run_one(self, each: Readiness, share: float | None, say: Callable[[str], None]) -> Iterator[str]:
        limit = [] if share is None else [f"--budget={told_duration(max(1, share))}"]
        if each.obstacle:
            say(f"{each.spec.name}: {each.obstacle}")
        command = [*self.command, "--session", each.session, "--", *QUIET, *limit, *self.options]
        say(" ".join(["nox", *command[len(self.command) :]]))
        before = _states(self.results)
        status = self.start(command)
        fresh = [file for file, state in _states(self.results).items() if before.get(file) != state]
        heard = any((told := environment_of(file)) and told[0] == each.spec.name for file in fresh)
        if status and not heard:
            yield f"{each.spec.name}: nox -s {each.session} ended with {status} and recorded nothing"


def start_and_wait(command: Sequence[str], *, outside: bool = True) -> int:
    """Run it, outside this virtual environment or in it. On Ctrl-C it gets the time to account for its cases."""
    process = subprocess.Popen(command, env=outside_variables() if outside else None)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal has told it, too; a second Ctrl-C ends this wait
        raise


def runnable(names: Collection[str], ready: Sequence[Readiness]) -> list[Readiness]:
    """The environments of these names, or without names all, that can run here: where no GPU is, by name on the CPU.

    Raises EnvironmentsError for an unknown name, and for one of which nothing can run here.
    """
    can = [each for each in ready if not each.obstacle or (names and each.on_cpu)]
    specs: Mapping[str, EnvironmentSpec] = {each.spec.name: each.spec for each in ready}
    picked: set[str] = set()
    for name in names:
        meant = {spec.name for spec in chosen([name], specs)}
        if not any(each.spec.name in meant for each in can):
            why = "; ".join(f"{each.spec.name}: {each.obstacle}" for each in ready if each.spec.name in meant)
            raise EnvironmentsError(f"{name} cannot run here: {why}")
        picked |= meant
    return [each for each in can if not names or each.spec.name in picked]


def definitions_matching(patterns: Iterable[str], dataset: DataSet, ops: Sequence[str]) -> list[str]:
    """Names of the definitions that some pattern means: an op, an op_type or a definition, or a glob of these.

    Raises ValueError for a pattern that means none, with the names that come near.
    """
    every = sorted(dataset.definitions.values(), key=lambda definition: definition.name)
    called = {each.name: (op_of(each, ops), each.op_type, each.name) for each in every}
    found: dict[str, None] = {}
    for pattern in patterns:
        hits = [name for name, calls in called.items() if any(fnmatchcase(call, pattern) for call in calls)]
        if not hits:
            raise ValueError(f"{pattern!r} is no op, op_type or definition; {_near(pattern, called.values())}")
        found.update(dict.fromkeys(hits))
    return list(found)


def _near(pattern: str, called: Iterable[tuple[str, str, str]]) -> str:
    ops, op_types, names = (set(column) for column in zip(*called, strict=True))
    near = get_close_matches(pattern.strip("*"), sorted(ops | op_types | names), n=5, cutoff=0.5)
    return f"near it: {', '.join(near)}" if near else f"legal op_types: {', '.join(sorted(op_types))}"


def _states(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file of records: a run makes one or adds to one."""
    found = ((file, file.stat()) for file in folder.glob("*.jsonl"))
    return {file: (state.st_size, state.st_mtime_ns) for file, state in found}

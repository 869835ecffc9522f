"""Compiling ahead what the ground truth of a data set would compile at its first call, while it holds a GPU.

Which modules that are, the sources say; see `Sources.kernels`. Nothing here needs a GPU.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

from refgrid.dataset.case import op_of
from refgrid.dataset.definition import Definition
from refgrid.sources import KernelModule, Sources

_ERROR = re.compile(r"\berror\b|fatal|undefined reference|cannot find|not found|killed", re.IGNORECASE)
_LOOK_EVERY = 0.5  # seconds between looks at how far a build has come


@dataclass
class WarmPlan:
    """What is to be compiled, and what is not and why.

    `users` gives for each module the sources and ops that load it, `at_first_call` for each source and op what compiles
    then, `absent` why a source cannot serve an op here, `broken` what kept a source from telling its modules.
    """

    modules: dict[str, KernelModule] = field(default_factory=dict)
    users: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    at_first_call: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Built:
    """How the build of a module ended: `error` is empty, or the compiler's first words about what is wrong."""

    name: str
    seconds: float
    compiled: bool
    error: str = ""


def plan_warm(definitions: Iterable[Definition], sources: Sources) -> WarmPlan:
    """Ask every source of every definition; imports the libraries, whose settings must stand by then."""
    plan = WarmPlan()
    for definition in definitions:
        op = op_of(definition, sources.ops)
        for source in sources.serving(op):
            _ask(plan, sources, source, op, definition)
    return plan


def _ask(plan: WarmPlan, sources: Sources, source: str, op: str, definition: Definition) -> None:
    user = f"{source} {op}"
    try:
        found = sources.kernels(source, op, _forms(definition))
    except Exception as error:  # noqa: BLE001 - a library's own; the others' modules are compiled nevertheless
        if verdict := getattr(error, "verdict", ""):
            plan.absent[user] = f"{verdict}: {getattr(error, 'reason', error)}"
        else:
            plan.broken[user] = f"{definition.name}: {type(error).__name__}: {first_errors(str(error))}"
        return
    if found.at_first_call:
        plan.at_first_call[user] = found.at_first_call
    for module in found.ahead:
        plan.modules[module.name] = module
        if user not in plan.users[module.name]:
            plan.users[module.name].append(user)


def _forms(definition: Definition) -> dict[str, tuple[tuple[int | None, ...], str]]:
    """Shape and dtype of each tensor, None for what a workload binds."""
    return {
        name: (tuple(definition.axes[axis].value for axis in spec.shape), spec.dtype)
        for name, spec in definition.inputs.items()
        if spec.shape is not None
    }


class Progress:
    """Told of each build; the base class says nothing."""

    def started(self, module: KernelModule) -> None:
        """Its turn has come."""

    def moved(self, module: KernelModule, done: int) -> None:
        """So many of its sources are compiled."""

    def ended(self, built: Built) -> None:
        """It is there, or it failed."""


def compile_modules(
    modules: Iterable[KernelModule], jobs: int, slot: AbstractContextManager[object], progress: Progress
) -> list[Built]:
    """Build every module, those of most sources first, and go on after one that fails; in the order of their ends.

    As many threads as compilers; each waits for `slot` before it runs one.
    """
    order = sorted(modules, key=lambda module: -module.sources)
    locks: Mapping[Path, Lock] = defaultdict(Lock, {module.folder: Lock() for module in order})
    pool = ThreadPoolExecutor(max_workers=max(1, min(jobs, len(order))), thread_name_prefix="warm")
    running: dict[str, KernelModule] = {}

    def build(module: KernelModule) -> Built:
        with locks[module.folder], slot:
            running[module.name] = module
            return _build(module)

    try:
        futures = [pool.submit(build, module) for module in order]
        return list(_watched(futures, running, progress))
    finally:
        pool.shutdown(cancel_futures=True)  # what is interrupted starts no further build


def _build(module: KernelModule) -> Built:
    before, start = _written(module.library), time.monotonic()
    try:
        module.compile()
        error = "" if module.library.exists() else f"the compiler was content, but {module.library} is not there"
    except Exception as failure:  # noqa: BLE001 - whatever it is, it is this module's, and the others go on
        error = first_errors(str(failure)) or repr(failure)
    return Built(module.name, time.monotonic() - start, _written(module.library) != before, error)


def _watched(futures: Sequence[Future[Built]], running: dict[str, KernelModule], progress: Progress) -> Iterator[Built]:
    """What has ended, as it ends; in this thread alone progress is shown."""
    pending, shown = set(futures), set[str]()
    while pending:
        ended, pending = wait(pending, timeout=_LOOK_EVERY, return_when=FIRST_COMPLETED)
        for name, module in list(running.items()):
            if name not in shown:
                shown.add(name)
                progress.started(module)
            progress.moved(module, sum(1 for _ in module.library.parent.glob("*.o")))
        for future in ended:
            built = future.result()
            running.pop(built.name, None)
            progress.ended(built)
            yield built


def _written(library: Path) -> int | None:
    return library.stat().st_mtime_ns if library.exists() else None


def first_errors(output: str, lines: int = 3) -> str:
    """The first lines of a compiler's output that speak of an error, else its last ones; commands are left out."""
    told = [line.strip()[:300] for line in output.splitlines() if line.strip() and not line.lstrip().startswith("[")]
    wrong = [line for line in told if _ERROR.search(line)]
    return "\n".join(dict.fromkeys(wrong[:lines] or told[-lines:]))

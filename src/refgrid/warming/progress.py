"""How far compiling ahead has come: a row a module on a terminal, else a line for each that ends."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from refgrid.sources import KernelModule
from refgrid.warming.warm import Built
from refgrid.warming.warm import Progress as Watcher

_WIDTH = 44  # of a name; what tells FlashInfer's long ones apart stands at their ends


@contextlib.contextmanager
def display(total: int, jobs: int, console: Console | None = None) -> Iterator[Display]:
    """Show all builds."""
    console = console or Console(file=sys.stderr)
    console.print(f"{total} modules, up to {jobs} {'compiler' if jobs == 1 else 'compilers'} at once")
    shown = Display(total, console)
    shown.start()
    try:
        yield shown
    finally:
        shown.stop()


class Display(Watcher):
    """What is shown of all builds."""

    def __init__(self, total: int, console: Console) -> None:
        self._console = console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._rows = Progress(*columns, console=self._console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._total, self._done = total, 0
        self._all: TaskID | None = None

    def start(self) -> None:
        """Rows, where there is a terminal for them."""
        if self._console.is_terminal:
            self._all = self._rows.add_task("modules", total=self._total)
            self._rows.start()

    def stop(self) -> None:
        """No more rows; without a terminal there were none."""
        if self._all is not None:
            self._rows.stop()

    def started(self, module: KernelModule) -> None:
        """A row of its own, in the unit of its sources."""
        if self._console.is_terminal:
            self._tasks[module.name] = self._rows.add_task(short(module.name), total=module.sources)

    def moved(self, module: KernelModule, done: int) -> None:
        """The row's bar."""
        if (task := self._tasks.get(module.name)) is not None:
            self._rows.update(task, completed=min(done, module.sources))

    def ended(self, built: Built) -> None:
        """A line that stays."""
        self._done += 1
        what = "failed" if built.error else "compiled" if built.compiled else "was there"
        line = f"{self._done:3d}/{self._total}  {what:9}  {built.seconds:6.1f} s  {built.name}"
        self._console.print(line, style="red" if built.error else "", markup=False, highlight=False, soft_wrap=True)
        if built.error:
            self._console.print(built.error, style="red", markup=False, highlight=False, soft_wrap=True)
        if (task := self._tasks.pop(built.name, None)) is not None:
            self._rows.remove_task(task)
        if self._all is not None:
            self._rows.update(self._all, completed=self._done)


def short(name: str) -> str:
    """A name that fits into a row, without its middle."""
    return name if len(name) <= _WIDTH else f"{name[:16]}...{name[-(_WIDTH - 19) :]}"

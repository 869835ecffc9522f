"""One build at a time, and none of what is built, for the FlashInfer releases whose modules share one ninja log.

Up to 0.5 every module is built in the same folder. Whichever build ends rewrites the log there without the entries of
the others, and two at once rewrite each other's: with 0.5.3 and ten workers, modules that `warm` had compiled were
compiled again at first calls, for minutes. Later releases have a folder a module.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any


def guard(spec_class: type[Any]) -> None:
    """Let a module of this class be built once only, whoever asks; needs doing once a process, and twice is no harm."""
    if hasattr(spec_class, "build_dir") or hasattr(spec_class.build, "__wrapped__"):
        return
    from filelock import FileLock  # FlashInfer's own requirement

    unguarded = spec_class.build

    @functools.wraps(unguarded)
    def build(spec: Any, *args: Any, **kwargs: Any) -> None:
        library = Path(spec.jit_library_path)
        library.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(library.parent.parent / ".refgrid.lock"):
            if not _is_finished(library):
                unguarded(spec, *args, **kwargs)
                _stamp(library).write_text(_state(library), encoding="utf-8")

    spec_class.build = build


def _is_finished(library: Path) -> bool:
    """Whether the file is the one that a build left: a killed linker leaves a file as well."""
    return library.is_file() and _stamp(library).is_file() and _stamp(library).read_text("utf-8") == _state(library)


def _stamp(library: Path) -> Path:
    return library.with_name(f"{library.name}.refgrid")


def _state(library: Path) -> str:
    status = library.stat()
    return f"{status.st_size} bytes, {status.st_mtime_ns} ns"

"""Runs what a definition publishes: its own `reference` text, nothing else."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Callable
from typing import Any

from refgrid.dataset.definition import Definition, DefinitionError


def compile_reference(definition: Definition) -> Callable[..., Any]:
    """The `run` of the definition's reference, executed from its text.

    The text is known to linecache, so tracebacks show its lines. Raises DefinitionError when executing it fails.
    """
    file = f"<reference of {definition.name}>"
    linecache.cache[file] = (len(definition.reference), None, definition.reference.splitlines(True), file)
    namespace: dict[str, Any] = {"__name__": f"reference_{definition.name}"}
    try:
        exec(compile(definition.reference, file, "exec"), namespace)
    except Exception as error:
        raise DefinitionError(definition.file, "reference", f"{type(error).__name__}: {error}") from error
    run: Callable[..., Any] = namespace["run"]
    return run


def text_hash(text: str) -> str:
    """SHA-256 of a text, as records keep it."""
    return hashlib.sha256(text.encode()).hexdigest()

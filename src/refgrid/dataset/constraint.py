"""Constraints of a definition: Python over axes and inputs. They are trusted: the reference is executed too."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

# What a constraint may call.
_FUNCTIONS: dict[str, Any] = {f.__name__: f for f in (abs, all, any, int, len, max, min, sum)}


class Constraint:
    """One expression that must hold; `names` are the axes and inputs it speaks of."""

    def __init__(self, text: str) -> None:
        self.text = text
        used = [node.id for node in ast.walk(ast.parse(text, mode="eval")) if isinstance(node, ast.Name)]
        self.names = [name for name in dict.fromkeys(used) if name not in _FUNCTIONS]

    def fault(self, known: Mapping[str, Any]) -> str:
        """Why it does not hold, with the values it names; empty when it holds."""
        names = {name: known[name] for name in self.names if name in known}
        try:
            # names are globals: a comprehension in a constraint would not see locals
            holds = bool(eval(self.text, {"__builtins__": _FUNCTIONS, **names}))  # noqa: S307 - trusted, see above
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the constraint's
            return f"{self.text!r} cannot be evaluated: {type(error).__name__}: {error}"
        told = ", ".join(f"{name} = {_told(value)}" for name, value in names.items())
        return "" if holds else f"{self.text!r} does not hold: {told}"


def _told(value: Any) -> str:
    """A tensor in full where it is short, else its dtype and shape."""
    if not hasattr(value, "numel"):
        return str(value)
    return str(value.tolist()) if value.numel() <= 16 else f"{value.dtype} {list(value.shape)}"

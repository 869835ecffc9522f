"""What the text of a reference or a constraint says, read without running it."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import Any


def faults(text: str, inputs: Collection[str]) -> Iterator[str]:
    """What keeps a reference from being called: it does not parse, has no `run`, or `run` takes other parameters."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        yield f"does not parse: {error.msg} at line {error.lineno}"
        return
    except ValueError as error:  # a null byte, before Python 3.12
        yield f"does not parse: {error}"
        return
    runs = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"]
    if not runs:
        yield "has no top-level function run"
        return
    given = runs[-1].args
    parameters = [argument.arg for argument in (*given.posonlyargs, *given.args)]
    if parameters != list(inputs) or given.vararg or given.kwarg or given.kwonlyargs:
        yield f"run takes {parameters} but the inputs are {list(inputs)}"


def literals(text: str) -> Iterator[tuple[str, Any]]:
    """Name and value of every literal that is assigned or passed by keyword, e.g. `EPS = 1e-6` or `f(x, eps=1e-6)`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield from ((t.id.lower(), node.value.value) for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.keyword) and node.arg and isinstance(node.value, ast.Constant):
            yield node.arg.lower(), node.value.value


def is_expression(text: str) -> bool:
    """Whether a constraint is one Python expression."""
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True

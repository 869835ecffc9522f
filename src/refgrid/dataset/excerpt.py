"""Excerpts of a package's source: one function with all that it needs, as text that stands alone."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

_LINE_LENGTH = 110
_NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_IMPORTS = (ast.Import, ast.ImportFrom)


class ExcerptError(ValueError):
    """A module does not hold the op, or holds it with other parameters than asked for."""


class Module:
    """A source file, read and parsed but not executed. Raises OSError or SyntaxError when that fails."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8")
        self._lines = text.splitlines()
        self._tree = ast.parse(text, filename=str(path))
        self._siblings: dict[str, Module] = {path.stem: self}

    def reference(self, op: str, inputs: Sequence[str], constants: Mapping[str, Any]) -> str:
        """Source of `op`, what it needs, and a `run(<inputs>)` that calls it with its constants as literals.

        Raises ExcerptError when the module has no such function or its parameters are others.
        """
        call = self._call(op, inputs, constants)
        imports, constant_texts, functions = self._needed(op)
        head = "\n".join(imports)
        blocks = [head, *(["\n".join(constant_texts)] if constant_texts else [])]
        run = f"@torch.no_grad()\ndef run({', '.join(inputs)}):\n    {call}"
        return "\n\n".join(blocks) + "\n\n\n" + "\n\n\n".join([*functions, run]) + "\n"

    def _call(self, op: str, inputs: Sequence[str], constants: Mapping[str, Any]) -> str:
        function = self.names.get(op)
        if not isinstance(function, ast.FunctionDef):
            raise ExcerptError(f"{self.path.name} has no function {op}")
        positional, keyword, required = _parameters(function)
        given = [name for name in positional if name in inputs] + [name for name in keyword if name in inputs]
        if given != list(inputs):
            raise ExcerptError(f"{op} takes {positional + keyword} but the inputs are {list(inputs)}")
        unbound = [name for name in required if name not in inputs and name not in constants]
        strays = [name for name in constants if name not in keyword]
        if unbound or strays:
            wrong = f"binds no {unbound[0]}" if unbound else f"binds {strays[0]}, which is no keyword-only parameter"
            raise ExcerptError(f"{op} takes {positional + keyword} but the table {wrong}")
        lead = [name for at, name in enumerate(positional) if list(inputs[: at + 1]) == positional[: at + 1]]
        rest = [f"{name}={name}" for name in inputs if name not in lead]
        arguments = [*lead, *rest, *(f"{name}={value!r}" for name, value in constants.items())]
        line = f"return {op}({', '.join(arguments)})"
        wide = len(line) + 4 > _LINE_LENGTH
        return f"return {op}(\n        {', '.join(arguments)}\n    )" if wide else line

    def _needed(self, op: str) -> tuple[list[str], list[str], list[str]]:
        """Texts of the imports, assignments and functions that `op` reaches, those of its own module first."""
        imports: dict[str, None] = {}
        assigned: dict[str, None] = {}
        functions: dict[str, None] = {}
        for module, names in self._reached(op).items():
            for node in module.statements(names):
                kind = imports if isinstance(node, _IMPORTS) else functions if isinstance(node, _NAMED) else assigned
                kind[module.text(node)] = None
        return (
            sorted(imports, key=lambda text: (not text.startswith("from __future__"), text)),
            list(assigned),
            list(functions),
        )

    def _reached(self, op: str) -> dict[Module, set[str]]:
        """The names that `op` needs, by the module that binds them; no two modules may bind one name differently."""
        reached: dict[Module, set[str]] = {self: {"torch"}}
        owners: dict[str, Module] = {}
        queue = [(self, op)]
        while queue:
            module, name = queue.pop()
            node = module.names[name]
            if (sibling := module.sibling(node)) is not None:
                queue.append((sibling, name))
                continue
            if not isinstance(node, _IMPORTS) and owners.setdefault(name, module) is not module:
                raise ExcerptError(f"{op} needs two things called {name}: {owners[name].path.name}, {module.path.name}")
            reached.setdefault(module, set()).add(name)
            uses = {used.id for used in ast.walk(node) if isinstance(used, ast.Name)} & set(module.names)
            queue.extend((module, use) for use in sorted(uses) if use not in reached[module])
        return reached

    def sibling(self, node: ast.stmt) -> Module | None:
        """The module of this package that a statement imports from, if it does so in the one way that is legible."""
        if not isinstance(node, _IMPORTS):
            return None
        package = self.path.parent.name
        told = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if not (any(f"{name}.".startswith(f"{package}.") for name in told) or bool(getattr(node, "level", 0))):
            return None
        plain = isinstance(node, ast.ImportFrom) and not node.level and told[0].count(".") == 1
        if not plain or any(alias.asname or alias.name == "*" for alias in node.names):
            raise ExcerptError(
                f"{self.path.name}: {ast.unparse(node)!r} should be 'from {package}.<module> import <name>'"
            )
        stem = told[0].rpartition(".")[2]
        return self._siblings.setdefault(stem, self if stem == self.path.stem else self._open(stem))

    def _open(self, stem: str) -> Module:
        try:
            module = Module(self.path.with_name(f"{stem}.py"))
        except OSError as error:
            raise ExcerptError(f"{self.path.name} imports from {stem}: {error.strerror}") from error
        module._siblings = self._siblings  # of the same class: each file is read once
        return module

    def statements(self, names: set[str]) -> list[ast.stmt]:
        """The statements that bind some of `names`, and imports from the future, in order."""
        return [node for node in self._tree.body if names & set(_bound(node)) or _is_future(node)]

    @cached_property
    def names(self) -> dict[str, ast.stmt]:
        """What the module binds at its top level, and where."""
        names = {name: node for node in self._tree.body for name in _bound(node)}
        if "torch" not in names:
            raise ExcerptError(f"{self.path.name} does not import torch")
        return names

    def text(self, node: ast.stmt) -> str:
        """Whole lines of a statement with its decorators and the comment lines right above."""
        begin = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))]) - 1
        while begin and self._lines[begin - 1].startswith("#"):
            begin -= 1
        return "\n".join(self._lines[begin : node.end_lineno])


def _parameters(function: ast.FunctionDef) -> tuple[list[str], list[str], list[str]]:
    """Names of the positional, of the keyword-only, and of the required parameters."""
    arguments = function.args
    positional = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    keyword = [a.arg for a in arguments.kwonlyargs]
    required = positional[: len(positional) - len(arguments.defaults)]
    required += [name for name, default in zip(keyword, arguments.kw_defaults, strict=True) if default is None]
    return positional, keyword, required


def _bound(node: ast.stmt) -> list[str]:
    """The module-level names that a statement binds."""
    if isinstance(node, _NAMED):
        return [node.name]
    if isinstance(node, _IMPORTS):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"

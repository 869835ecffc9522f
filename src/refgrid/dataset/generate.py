"""Writes `tests/references/test_<op_type>.py`: one short class a definition over the shared contract.

What stands in a file is kept, whoever wrote it: a class is appended where none names the definition, and replaced
only when forced.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2

from refgrid.dataset.case import SIZES, Selection, Size, op_of
from refgrid.dataset.definition import DataSet, Definition

_HEAD = '''"""Reference tests of op_type {op_type}; `refgrid add-reference-tests` adds classes for new definitions."""

from refgrid.contract import ReferenceContract
'''


@dataclass(frozen=True)
class Request:
    """Which classes to write and what stands in them."""

    selection: Selection
    output: Path
    force: bool = False
    test_sizes: tuple[Size, ...] = ()
    tolerance: float | None = None
    tolerance_reason: str = ""


@dataclass
class Coverage:
    """What was found and done, by op_type: definition names."""

    written: list[Definition] = field(default_factory=list)
    kept: list[Definition] = field(default_factory=list)
    untested: list[Definition] = field(default_factory=list)

    def row(self, op_type: str) -> tuple[int, int, int, int]:
        """definitions, written now, tested before, still without a test."""
        counts = [sum(d.op_type == op_type for d in part) for part in (self.written, self.kept, self.untested)]
        return sum(counts), counts[0], counts[1], counts[2]

    @property
    def op_types(self) -> list[str]:
        """Every op_type of the data set."""
        return sorted({d.op_type for part in (self.written, self.kept, self.untested) for d in part})


def add_reference_tests(dataset: DataSet, ops: Iterable[str], request: Request) -> Coverage:
    """Write the missing classes (all selected ones when forced); a second run changes nothing.

    Raises ValueError for a name the data set does not have, SyntaxError for a test file that does not parse.
    """
    request.selection.check(dataset)
    coverage, tested, known = Coverage(), definitions_with_tests(request.output), tuple(ops)
    for definition in dataset.definitions.values():
        if not _wanted(definition, request.selection):
            (coverage.kept if definition.name in tested else coverage.untested).append(definition)
        elif definition.name in tested and not request.force:
            coverage.kept.append(definition)
        else:
            _write(definition, op_of(definition, known), request)
            coverage.written.append(definition)
    return coverage


def definitions_with_tests(folder: Path) -> dict[str, Path]:
    """Every definition that a class in the folder's test files names, and the file."""
    files = sorted(folder.glob("test_*.py")) if folder.is_dir() else []
    return {name: file for file in files for name, _ in _classes(file.read_text(encoding="utf-8"), file)}


def class_name(definition_name: str) -> str:
    """rmsnorm_h4096 -> TestRmsnormH4096."""
    return "Test" + "".join(part.capitalize() for part in definition_name.split("_"))


def _wanted(definition: Definition, selection: Selection) -> bool:
    named = not selection.definitions or definition.name in selection.definitions
    return named and (not selection.op_types or definition.op_type in selection.op_types)


def _write(definition: Definition, op: str, request: Request) -> None:
    file = definitions_with_tests(request.output).get(definition.name)
    file = file or request.output / f"test_{definition.op_type}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text(encoding="utf-8") if file.exists() else _HEAD.format(op_type=definition.op_type)
    new = _merged(text, definition.name, _rendered(definition, op, request), file)
    if not file.exists() or new != text:
        file.write_text(new, encoding="utf-8")


def _merged(text: str, definition_name: str, block: str, file: Path) -> str:
    lines = text.splitlines()
    for name, node in _classes(text, file):
        if name == definition_name:
            lines[node.lineno - 1 : node.end_lineno] = block.splitlines()
            return "\n".join(lines) + "\n"
    return text.rstrip("\n") + "\n\n\n" + block + "\n"


def _rendered(definition: Definition, op: str, request: Request) -> str:
    sizes = tuple(size for size in SIZES if size in request.test_sizes)
    return _template().render(
        class_name=class_name(definition.name),
        definition=definition,
        op=op,
        test_sizes=sizes,
        tolerance=request.tolerance,
        tolerance_reason=request.tolerance_reason,
    )


@cache
def _template() -> jinja2.Template:
    loader = jinja2.PackageLoader("refgrid")
    return jinja2.Environment(loader=loader, autoescape=False).get_template("test_class.py.j2")


def _classes(text: str, file: Path) -> Iterator[tuple[str, ast.ClassDef]]:
    """Each class with a literal `definition_name`, and that name."""
    for node in ast.parse(text, str(file)).body:
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant):
                targets = [target.id for target in statement.targets if isinstance(target, ast.Name)]
                if "definition_name" in targets and isinstance(node, ast.ClassDef):
                    yield str(statement.value.value), node

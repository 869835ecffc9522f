"""Renders definitions: JSON files that carry their reference as text, from a package of references.

A references package holds modules of functions and, beside a module `m.py`, its table `m.toml`: families of definitions
and their sizes. Nothing of it is imported, so rendering needs no torch. The files follow the schema of
flashinfer-bench 0.1.2.

A `[[family]]` is one interface: `op` is a function of the module; axes stand in order (a text describes a var axis,
`const` axes take their value from the family or from the size); tensors are "dtype axis axis ..." with an optional
description after a colon ("dtype" alone is a Python scalar). `constants` are keyword-only parameters of the op that no
shape shows. A size gives the const axes, its tags, and, where they differ, constants and the `note` that its
description ends with. {x} in `name`, `description` and `[notes]` stands for an axis or a constant.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refgrid.dataset.excerpt import ExcerptError, Module

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FAMILY_KEYS = {
    "op": str, "op_type": str, "name": str, "description": str, "tags": str, "sizes": list,
    "axes": dict, "inputs": dict, "outputs": dict,
}  # fmt: skip
_OPTIONAL_KEYS = {"constants": dict, "constraints": list}


class RenderError(ValueError):
    """A row of the table cannot be rendered: names the family (or file), the field and the reason."""

    def __init__(self, family: str, field: str, reason: str) -> None:
        super().__init__(f"{family}: {field}: {reason}")
        self.family, self.field, self.reason = family, field, reason


def render(package: str, root: Path) -> list[Path]:
    """Write definitions/<op_type>/<name>.json below `root` for every row of the table of `package`.

    Returns the files in order of name. Raises RenderError before anything is written when a row is broken.
    """
    texts = _texts(package)
    paths = [root / relative for relative in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return paths


def stale(package: str, root: Path) -> list[str]:
    """Which files below `root` are not what `render` would write, each with why: missing, differs or left over."""
    texts = _texts(package)
    found = {path.relative_to(root).as_posix(): path for path in (root / "definitions").glob("*/*.json")}
    lines = [f"{name}: missing" for name in texts if name not in found]
    lines += [f"{name}: left over" for name in found if name not in texts]
    both = [name for name in texts if name in found]
    lines += [f"{name}: differs" for name in both if found[name].read_text(encoding="utf-8") != texts[name]]
    return sorted(lines)


def _texts(package: str) -> dict[str, str]:
    """Path below the root -> file content, sorted by path."""
    texts: dict[str, str] = {}
    for path in _tables(package):
        table, module = _table(path), _module(path)
        for position, family in enumerate(table["family"]):
            label = _checked(family, path.name, position)
            for size in family["sizes"]:
                definition = _definition(family, size, table.get("notes", {}), module, label)
                file = f"definitions/{definition['op_type']}/{definition['name']}.json"
                if file in texts:
                    raise RenderError(label, "sizes", f"{definition['name']} stands twice")
                texts[file] = json.dumps(definition, indent=2, ensure_ascii=False) + "\n"
    return dict(sorted(texts.items()))


def _tables(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RenderError(package, "package", "is not installed here")
    folder = Path(next(iter(spec.submodule_search_locations)))
    tables = sorted(folder.glob("*.toml"))
    if not tables:
        raise RenderError(package, "package", f"holds no <module>.toml in {folder}")
    return tables


def _table(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RenderError(str(path), "file", str(error)) from None
    if not isinstance(table.get("family"), list):
        raise RenderError(str(path), "family", "holds no [[family]]")
    return table


def _checked(family: Mapping[str, Any], file: str, position: int) -> str:
    """The label of a family for messages, after its keys and their types are known to be right."""
    label = f"{file}: family {family.get('name', position)}"
    for key in family:
        if key not in _FAMILY_KEYS and key not in _OPTIONAL_KEYS:
            raise RenderError(label, key, f"is no key of a family: {sorted({**_FAMILY_KEYS, **_OPTIONAL_KEYS})}")
    for key, kind in {**_FAMILY_KEYS, **_OPTIONAL_KEYS}.items():
        if key not in family and key in _FAMILY_KEYS:
            raise RenderError(label, key, "is missing")
        if not isinstance(family.get(key, kind()), kind):
            raise RenderError(label, key, f"is {family[key]!r} but should be a {kind.__name__}")
    return label


def _module(table: Path) -> Module:
    try:
        return Module(table.with_suffix(".py"))
    except (OSError, SyntaxError) as error:
        raise RenderError(table.name, "module", str(error)) from None


def _definition(
    family: Mapping[str, Any], size: Mapping[str, Any], notes: Mapping[str, str], module: Module, label: str
) -> dict[str, Any]:
    axes, constants = _axes(family, size, label), _constants(family, size, label)
    values = {name: axis["value"] for name, axis in axes.items() if "value" in axis} | constants
    note = size.get("note")
    if note is not None and note not in notes:
        raise RenderError(label, "sizes.note", f"{note!r} is not in [notes]: {sorted(notes)}")
    description = " ".join([family["description"], *([notes[note]] if note else [])])
    inputs = _tensors(family, "inputs", axes, label)
    try:
        reference = module.reference(family["op"], list(inputs), constants)
    except ExcerptError as error:
        raise RenderError(label, "op", str(error)) from None
    definition = {
        "name": _filled(family["name"], values, label, "name"),
        "op_type": family["op_type"],
        "description": _filled(description, values, label, "description"),
        "tags": [*family["tags"].split(), *size.get("tags", "").split(), *_told(constants)],
        "axes": axes,
        "constraints": family.get("constraints", []),
        "inputs": inputs,
        "outputs": _tensors(family, "outputs", axes, label),
        "reference": reference,
    }
    return {key: value for key, value in definition.items() if value != []}


def _axes(family: Mapping[str, Any], size: Mapping[str, Any], label: str) -> dict[str, dict[str, Any]]:
    """The definition's axes; the value of a const axis comes from the size or else from the family."""
    axes: dict[str, dict[str, Any]] = {}
    for name, given in family["axes"].items():
        if isinstance(given, str):
            axes[name] = {"type": "var", "description": given}
            continue
        value = size.get(name, given.get("value"))
        if type(value) is not int or value < 1:
            raise RenderError(label, f"sizes.{name}", f"is {value!r} but should be a positive integer, in {dict(size)}")
        axes[name] = {"type": "const", "value": value, "description": given.get("const", "")}
    legal = {name for name, axis in axes.items() if "value" in axis} | {"tags", "note", *family.get("constants", {})}
    for key in size:
        if key not in legal:
            raise RenderError(label, f"sizes.{key}", f"is neither a const axis nor one of {sorted(legal)}")
    return axes


def _told(constants: Mapping[str, Any]) -> list[str]:
    """Constants as tags, so that a ground truth need not take them from the very text that is under test."""
    return [f"{name}:{value!r}" for name, value in constants.items()]


def _constants(family: Mapping[str, Any], size: Mapping[str, Any], label: str) -> dict[str, Any]:
    constants = {name: size.get(name, default) for name, default in family.get("constants", {}).items()}
    for name, value in constants.items():
        if not isinstance(value, (bool, int, float, str)):
            raise RenderError(label, f"sizes.{name}", f"is {value!r} but should be a number, bool or string")
    return constants


def _tensors(family: Mapping[str, Any], kind: str, axes: Mapping[str, Any], label: str) -> dict[str, dict[str, Any]]:
    """Read "dtype axis axis ...: description"; a dtype alone is a Python scalar."""
    tensors: dict[str, dict[str, Any]] = {}
    for name, text in family[kind].items():
        spec, _, description = text.partition(":")
        dtype, *shape = spec.split() or [""]
        strays = [axis for axis in shape if axis not in axes]
        if not dtype or strays:
            reason = f"unknown axis {strays[0]!r}: axes are {list(axes)}" if strays else "names no dtype"
            raise RenderError(label, f"{kind}.{name}", reason)
        tensors[name] = {"shape": shape or None, "dtype": dtype}
        if description:
            tensors[name]["description"] = description.strip()
    return tensors


def _filled(text: str, values: Mapping[str, Any], label: str, field: str) -> str:
    try:
        return text.format_map(values)
    except (KeyError, IndexError, ValueError) as error:
        raise RenderError(label, field, f"{{{error}}} is none of {sorted(values)}") from None

"""Definitions and workloads: what a kernel computes and at which sizes, read from a flashinfer-trace data set.

The schema is that of flashinfer-bench 0.1.2 (`definitions/<op_type>/<name>.json`, `workloads/<op_type>/<name>.jsonl`).
A broken file becomes a `DefinitionError` in `DataSet.broken` and stops nobody else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

from refgrid.dataset import reference_text

DType = Literal[
    "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "float4_e2m1",
    "int64", "int32", "int16", "int8", "uint8", "bool",
]  # fmt: skip
DTYPES: tuple[str, ...] = get_args(DType)

# Foreign data sets carry keys of their own (init, check, ...); they are not ours to refuse.
_FROZEN = ConfigDict(extra="ignore")


class DefinitionError(ValueError):
    """One file of a data set cannot be used: names the file, the field and the reason."""

    def __init__(self, file: Path | str, field: str, reason: str) -> None:
        super().__init__(f"{file}: {field}: {reason}")
        self.file, self.field, self.reason = str(file), field, reason

    def below(self, root: Path) -> DefinitionError:
        """The same error with the file named from the data set's root, alike on every machine."""
        file = Path(self.file)
        return DefinitionError(file.relative_to(root) if file.is_relative_to(root) else file, self.field, self.reason)

    @property
    def name(self) -> str:
        """What the row of this file is called: the file's stem."""
        return Path(self.file).stem


@checked(frozen=True, config=_FROZEN)
class Axis:
    """A dimension: fixed by the definition (`const`) or bound by the workload (`var`)."""

    type: Literal["const", "var"]
    value: Annotated[int, Field(ge=0)] | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        if (self.type == "const") != (self.value is not None):
            raise ValueError("a const axis has a value and a var axis has none")


@checked(frozen=True, config=_FROZEN)
class TensorSpec:
    """Shape as axis names (`None` = a Python scalar, `()` = a 0-d tensor) and dtype of one input or output."""

    shape: tuple[str, ...] | None
    dtype: DType
    description: str | None = None


@checked(frozen=True, config=_FROZEN)
class InputSpec:
    """How a workload fills one input: drawn, given, or read from a file of the data set."""

    type: Literal["random", "scalar", "safetensors"]
    value: int | float | bool | None = None
    path: str | None = None
    tensor_key: str | None = None


@checked(frozen=True, config=_FROZEN)
class Workload:
    """One concrete size of a definition; `uuid` names it within its definition."""

    uuid: Annotated[str, Field(min_length=1)]
    axes: Mapping[str, Annotated[int, Field(ge=0)]]
    inputs: Mapping[str, InputSpec]


@checked(frozen=True, config=_FROZEN)
class _WorkloadLine:
    definition: str
    workload: Workload


@checked(frozen=True, config=_FROZEN)
class Definition:
    """What a kernel computes: axes, inputs, outputs and a pure-PyTorch `reference` with a top-level `run`."""

    name: Annotated[str, Field(min_length=1)]
    op_type: Annotated[str, Field(min_length=1)]
    axes: Mapping[str, Axis]
    inputs: Mapping[str, TensorSpec]
    outputs: Annotated[Mapping[str, TensorSpec], Field(min_length=1)]
    reference: str
    constraints: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    description: str | None = None
    path: Path | None = None

    def axis_values(self, bound: Mapping[str, int]) -> dict[str, int]:
        """Every axis with its value: the definition's constants and the workload's bindings.

        Raises DefinitionError for an axis that stays open or a binding that is no var axis.
        """
        values = {name: axis.value if axis.value is not None else bound.get(name) for name, axis in self.axes.items()}
        for name, value in values.items():
            if value is None:
                raise DefinitionError(self.file, f"axes.{name}", f"has no value: the workload binds {sorted(bound)}")
        strays = [name for name in bound if name not in self.axes or self.axes[name].type == "const"]
        if strays:
            raise DefinitionError(self.file, f"axes.{strays[0]}", "is bound by the workload but is no var axis")
        return {name: value for name, value in values.items() if value is not None}

    def shape(self, tensor: str, axis_values: Mapping[str, int]) -> tuple[int, ...] | None:
        """The concrete shape of one input or output; None for a Python scalar."""
        spec = self.inputs.get(tensor) or self.outputs[tensor]
        return None if spec.shape is None else tuple(axis_values[axis] for axis in spec.shape)

    def is_weight(self, tensor: str) -> bool:
        """Whether an input or output is a tensor of constant shape: the same at every size."""
        spec = self.inputs.get(tensor) or self.outputs[tensor]
        return bool(spec.shape) and all(self.axes[axis].type == "const" for axis in spec.shape or ())

    def constant(self, name: str) -> Any:
        """A literal that the definition fixes though no shape shows it, such as `eps`.

        A const axis, else a tag `eps:1e-06`, else a literal of that name in the reference's text: a last resort of
        data sets without such tags, since a reference must not tell its own truth. Raises DefinitionError when none
        says it.
        """
        if name in self.axes and self.axes[name].value is not None:
            return self.axes[name].value
        for tag in self.tags:
            if tag.startswith(f"{name}:"):
                return self._tagged(tag)
        if name.lower() in self._literals:
            return self._literals[name.lower()]
        raise DefinitionError(
            self.file, "reference", f"does not say {name}: no const axis, no tag and no literal of that name"
        )

    def _tagged(self, tag: str) -> Any:
        try:
            return ast.literal_eval(tag.partition(":")[2])
        except (SyntaxError, ValueError) as error:
            raise DefinitionError(self.file, "tags", f"{tag!r} should end in a Python literal") from error

    @property
    def file(self) -> str:
        """The file this came from, for messages."""
        return str(self.path or f"{self.name}.json")

    @cached_property
    def _literals(self) -> dict[str, Any]:
        return dict(reference_text.literals(self.reference))


@dataclass(frozen=True)
class DataSet:
    """All definitions and workloads below one root, sorted by name, and the files that could not be used."""

    root: Path
    definitions: Mapping[str, Definition]
    workloads: Mapping[str, tuple[Workload, ...]]
    broken: tuple[DefinitionError, ...] = field(default=())


_DEFINITION = TypeAdapter(Definition)
_WORKLOAD = TypeAdapter(_WorkloadLine)


def load_dataset(root: Path) -> DataSet:
    """Read `definitions/*/*.json` and `workloads/*/*.jsonl` below `root`.

    Raises DefinitionError when `root` holds no `definitions` folder: nothing to test is not a success.
    """
    if not (root / "definitions").is_dir():
        raise DefinitionError(root, "definitions", "no such folder: a data set has definitions/<op_type>/<name>.json")
    definitions: dict[str, Definition] = {}
    workloads: dict[str, tuple[Workload, ...]] = {}
    broken: list[DefinitionError] = []
    for path in sorted((root / "definitions").glob("*/*.json"), key=lambda p: p.stem):
        try:
            definition = _with_path(read_definition(path), path.relative_to(root))
            if definition.name in definitions:
                raise DefinitionError(path, "name", f"{definition.name} is also in {definitions[definition.name].path}")
            workloads[definition.name] = read_workloads(root, definition)
            definitions[definition.name] = definition
        except DefinitionError as error:
            broken.append(error.below(root))
    return DataSet(root, definitions, workloads, tuple(broken))


def read_definition(path: Path) -> Definition:
    """One definition, checked field by field.

    Raises DefinitionError naming the file, the field and the reason.
    """
    try:
        raw = _DEFINITION.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DefinitionError(path, *_first_error(error)) from None
    except OSError as error:
        raise DefinitionError(path, "file", error.strerror or str(error)) from None
    definition = _with_path(raw, path)
    for where, reason in _faults(definition, path):
        raise DefinitionError(path, where, reason)
    return definition


def read_workloads(root: Path, definition: Definition) -> tuple[Workload, ...]:
    """The workloads of one definition, in file order; none when it has no file.

    Raises DefinitionError naming the file, the line and the reason.
    """
    path = root / "workloads" / definition.op_type / f"{definition.name}.jsonl"
    if not path.exists():
        return ()
    found: dict[str, Workload] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            parsed = _WORKLOAD.validate_json(line)
        except ValidationError as error:
            where, reason = _first_error(error)
            raise DefinitionError(path, f"line {number}: {where}", reason) from None
        _check_workload(path, number, definition, parsed, found)
        found[parsed.workload.uuid] = parsed.workload
    return tuple(found.values())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DefinitionError(path, "file", f"cannot be read: {error}") from error


def _check_workload(
    path: Path, number: int, definition: Definition, line: _WorkloadLine, found: Mapping[str, Workload]
) -> None:
    workload, where = line.workload, f"line {number}: "
    if line.definition != definition.name:
        raise DefinitionError(path, where + "definition", f"is {line.definition!r} but should be {definition.name!r}")
    if workload.uuid in found:
        raise DefinitionError(path, where + "workload.uuid", f"{workload.uuid!r} stands twice")
    if set(workload.inputs) != set(definition.inputs):
        reason = f"are {sorted(workload.inputs)} but should be {sorted(definition.inputs)}"
        raise DefinitionError(path, where + "workload.inputs", reason)
    try:
        definition.axis_values(workload.axes)
    except DefinitionError as error:
        raise DefinitionError(path, where + f"workload.{error.field}", error.reason) from None


def _with_path(definition: Definition, path: Path) -> Definition:
    object.__setattr__(definition, "path", path)  # known only to the reader, frozen for everyone else
    return definition


def _first_error(error: ValidationError) -> tuple[str, str]:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "file"
    given = "" if first["type"] in ("json_invalid", "missing") else f" (found {_short(first['input'])})"
    return where, first["msg"] + given


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _faults(definition: Definition, path: Path) -> Iterator[tuple[str, str]]:
    if definition.name != path.stem:
        yield "name", f"is {definition.name!r} but the file is called {path.name}"
    if definition.op_type != path.parent.name:
        yield "op_type", f"is {definition.op_type!r} but the folder is called {path.parent.name}"
    yield from _axis_faults(definition)
    for name in definition.outputs:
        if name in definition.inputs:
            yield f"outputs.{name}", "is also an input: outputs need names of their own"
    for position, constraint in enumerate(definition.constraints):
        if not reference_text.is_expression(constraint):
            yield f"constraints.{position}", f"is no Python expression: {constraint!r}"
    yield from (("reference", fault) for fault in reference_text.faults(definition.reference, definition.inputs))


def _axis_faults(definition: Definition) -> Iterator[tuple[str, str]]:
    for kind, specs in (("inputs", definition.inputs), ("outputs", definition.outputs)):
        for name, spec in specs.items():
            for axis in spec.shape or ():
                if axis not in definition.axes:
                    yield f"{kind}.{name}.shape", f"axis {axis!r} is unresolvable: axes are {sorted(definition.axes)}"

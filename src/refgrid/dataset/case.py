"""Cases: definition x workload x what it is held against. The plan is the same on every machine and worker."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast, get_args

from refgrid.dataset.definition import DataSet, Definition, DefinitionError, Workload
from refgrid.dataset.memory import growing_bytes
from refgrid.dataset.smaller import changes, constants, told_changes, twin_of

Size = Literal["small", "medium", "large"]
SIZES: tuple[Size, ...] = get_args(Size)
Check = Literal["definition", "shape", "dtype", "numerics", "agreement", "determinism"]
CHECKS: tuple[Check, ...] = get_args(Check)

# Bytes of all inputs and outputs that grow with the workload: what a laptop, a workstation, a server run with ease.
_LIMITS: Mapping[Size, float] = {"small": 2.0**20, "medium": 2.0**28, "large": math.inf}
# A state or a row of a vocabulary is large by itself: so many of them are still small, medium.
_UNITS: Mapping[Size, float] = {"small": 8, "medium": 256, "large": math.inf}

EDGE = "edge"


@dataclass(frozen=True)
class Case:
    """One thing to prove; ends in exactly one verdict.

    `numerics` holds the reference against one `source`; the other checks need none, or (`agreement`) all of them.
    `definition` stands for a file that cannot be used at all. `twin` says, if it is not empty, that it is the
    definition's twin that is proven, and how its constants differ: "num_experts 128 -> 8, ...".
    """

    definition: str
    op_type: str
    op: str
    workload: str
    check: Check
    source: str | None = None
    size: Size = "small"
    seed: int = 0
    twin: str = ""

    @cached_property
    def id(self) -> str:
        """The case's name everywhere: in pytest, in records and in messages."""
        return f"{self.name}-seed{self.seed}" if self.seed else self.name

    @cached_property
    def name(self) -> str:
        """What cases that differ in their seed alone have in common: the id of the one of seed 0."""
        name = f"{self.definition}~twin" if self.twin else self.definition
        return "-".join(part for part in (name, self.workload, self.source or self.check) if part)

    @property
    def edge(self) -> bool:
        """Whether the workload is one of the hostile sizes."""
        return self.workload.startswith(EDGE)


@dataclass(frozen=True)
class Selection:
    """Which part of a data set to plan, over which seeds; empty means all, but for sizes and seeds.

    `load` names each illegal value beside the legal ones.
    """

    op_types: tuple[str, ...] = ()
    definitions: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = SIZES
    seeds: Sequence[int] = (0,)
    checks: tuple[Check, ...] = ()

    def check(self, dataset: DataSet) -> None:
        """Raise ValueError for a name that the data set does not have."""
        broken = {error.name for error in dataset.broken}
        _legal("--definition-name", self.definitions, {*dataset.definitions, *broken})
        _legal("--op-type", self.op_types, {d.op_type for d in dataset.definitions.values()} | _folders(dataset))
        _legal("--test-sizes", self.sizes, SIZES)


def plan(dataset: DataSet, sources: Mapping[str, Collection[str]], selection: Selection) -> list[Case]:
    """Every case of the selection, sorted by seed and definition; `sources` maps each op to the names that serve it.

    A broken file, and a definition without a workload, is a case of its own that can only end in `error`.
    """
    selection.check(dataset)
    once: list[Case] = []
    for name in sorted({*dataset.definitions, *(error.name for error in dataset.broken)}):
        if selection.definitions and name not in selection.definitions:
            continue
        once.extend(case for case in _cases(dataset, name, sources) if _selected(case, selection))
    return [replace(case, seed=seed) if seed else case for seed in selection.seeds for case in once]


def definition_of(dataset: DataSet, case: Case) -> Definition:
    """What a case is of: the definition itself or its twin."""
    definition = dataset.definitions[case.definition]
    return (twin_of(definition, dataset.workloads[case.definition]) if case.twin else None) or definition


def parse_sizes(text: str) -> tuple[Size, ...]:
    """Comma-separated sizes; raises ValueError naming the legal ones."""
    return cast("tuple[Size, ...]", _parsed("--test-sizes", text, SIZES))


def parse_checks(text: str) -> tuple[Check, ...]:
    """Comma-separated checks; raises ValueError naming the legal ones."""
    return cast("tuple[Check, ...]", _parsed("--checks", text, CHECKS))


def _parsed(option: str, text: str, legal: Sequence[str]) -> tuple[str, ...]:
    given = tuple(part.strip() for part in text.split(",") if part.strip())
    for each in given:
        if each not in legal:
            raise ValueError(f"{option} {each!r} is not known; legal values: {', '.join(legal)}")
    return given


def op_of(definition: Definition, ops: Iterable[str]) -> str:
    """The longest known op that begins the definition's name, else its op_type."""
    fitting = [op for op in ops if definition.name == op or definition.name.startswith(op + "_")]
    return max(fitting, key=len, default=definition.op_type)


def size_of(definition: Definition, workload: Workload) -> Size:
    """small, medium or large by the bytes that grow with the workload; weights of constant shape do not count."""
    total = growing_bytes(definition, definition.axis_values(workload.axes))
    unit = growing_bytes(definition, {name: axis.value or 1 for name, axis in definition.axes.items()})
    return next(size for size in SIZES if total <= max(_LIMITS[size], _UNITS[size] * unit))


def _cases(dataset: DataSet, name: str, sources: Mapping[str, Collection[str]]) -> Iterator[Case]:
    definition = dataset.definitions.get(name)
    if definition is None or not dataset.workloads[name]:
        op_type = definition.op_type if definition else _op_type_of_broken(dataset, name)
        yield Case(name, op_type, op_type, "", "definition")
        return
    op = op_of(definition, sources)
    held = tuple(_held_against(tuple(sources.get(op, ()))))
    try:
        twins = tuple(_twins(definition, dataset.workloads[name]))
    except DefinitionError:  # no smaller constants obey the constraints: said by a case of its own
        twins = ()
        yield Case(name, definition.op_type, op, "", "definition")
    for one, twin in ((definition, ""), *twins):
        for workload in dataset.workloads[name]:
            size = size_of(one, workload)
            for check, source in held:
                yield Case(name, definition.op_type, op, workload.uuid, check, source, size, twin=twin)


def _twins(definition: Definition, workloads: Iterable[Workload]) -> Iterator[tuple[Definition, str]]:
    """The twin, if the definition has one, and how it differs."""
    twin = twin_of(definition, workloads)
    if twin is not None:
        yield twin, told_changes(changes(constants(definition), constants(twin)))


def _held_against(sources: tuple[str, ...]) -> Iterator[tuple[Check, str | None]]:
    yield "shape", None
    yield "dtype", None
    for source in sources:
        yield "numerics", source
    if not sources:
        yield "numerics", None  # ends in no-ground-truth: silence would look like success
    if len(sources) > 1:
        yield "agreement", None
    yield "determinism", None


def _selected(case: Case, selection: Selection) -> bool:
    asked = ((selection.op_types, case.op_type), (selection.checks, case.check))
    return case.size in selection.sizes and all(not legal or found in legal for legal, found in asked)


def _folders(dataset: DataSet) -> set[str]:
    return {_op_type_of_broken(dataset, error.name) for error in dataset.broken}


def _op_type_of_broken(dataset: DataSet, name: str) -> str:
    file = next(error.file for error in dataset.broken if error.name == name)
    return file.replace("\\", "/").split("/")[-2]


def _legal(option: str, given: Iterable[str], legal: Collection[str]) -> None:
    for value in given:
        if value not in legal:
            raise ValueError(f"{option} {value!r} is not known; legal values: {', '.join(sorted(legal))}")

"""Smaller sizes: a workload cut to what fits into memory, and the twin of a definition whose constants may not fit.

Both halve one axis after the other as long as every constraint holds that speaks of axes, or of scalars, alone. Axes
that such a constraint equates with each other follow. Of a workload's axes none becomes larger than one that it was not
larger than: as many sequences as there were queries for, and a page for each index.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from refgrid.dataset.constraint import Constraint
from refgrid.dataset.definition import Definition, DefinitionError, Workload
from refgrid.dataset.memory import growing_bytes, told_bytes, weight_bytes, weights

# A definition with more bytes of weights has a twin with about as many as the second: a bound of the plan, which is the
# same on every machine.
TWIN_ABOVE, TWIN_BYTES = 2**30, 2**25
_HEAVY = 0.01  # share of the weights from which on one is worth shrinking

Axes: TypeAlias = dict[str, int]
Scalar: TypeAlias = float | int | bool


class CannotShrink(ValueError):
    """No smaller size fits: says what is needed at least."""


@dataclass(frozen=True)
class _Equation:
    """`axis == expression`, and the other way round where the expression is `factor * other`."""

    axis: str
    expression: str
    names: tuple[str, ...]
    factor: int | None

    def solved(self, axes: Mapping[str, int], known: set[str]) -> tuple[str, int] | None:
        """The side that is not known yet from the one that is."""
        if self.axis not in known and known & set(self.names):
            return self.axis, int(eval(self.expression, {"__builtins__": {}}, dict(axes)))  # noqa: S307 - as in Constraint
        if self.factor and self.axis in known and self.names[0] not in known:
            return self.names[0], axes[self.axis] // self.factor
        return None


@dataclass(frozen=True)
class _Relations:
    """What the constraints say of axes and scalars alone; `given` are the scalars of the workloads.

    `ordered` are the axes that stay in the order of their sizes.
    """

    equations: tuple[_Equation, ...]
    hold: tuple[Constraint, ...]
    given: tuple[Mapping[str, Scalar], ...] = ({},)
    ordered: tuple[str, ...] = ()

    def with_axis(self, axes: Axes, name: str, value: int) -> Axes | None:
        """The axes with one of them changed and those that follow it; None when a constraint is broken then."""
        known = {name, *(other for other in self.ordered if value < axes[other] <= axes[name])}
        found = {**axes, **dict.fromkeys(known, value)}
        for _ in self.equations:
            for equation in self.equations:
                if (solved := equation.solved(found, known)) is not None:
                    found[solved[0]] = solved[1]
                    known.add(solved[0])
        broken = any(found[axis] < min(1, axes[axis]) for axis in known)
        return None if broken or any(self.faults(found)) else found

    def faults(self, axes: Axes) -> Iterator[str]:
        """Why each constraint that does not hold does not."""
        for constraint in self.hold:
            of_scalars = any(name not in axes for name in constraint.names)
            given = self.given if of_scalars else ({},)
            yield from filter(None, (constraint.fault({**axes, **scalars}) for scalars in given))


def fitted(definition: Definition, axes: Axes, fits: Callable[[Axes], bool]) -> Axes:
    """The axes of a workload, its var axes halved until it fits.

    Raises CannotShrink when the smallest size that the constraints allow does not.
    """
    var = [name for name, axis in definition.axes.items() if axis.type == "var"]
    relations = _relations(definition, set(definition.axes))
    follow = {equation.axis for equation in relations.equations}
    relations = replace(relations, ordered=tuple(name for name in var if name not in follow))
    return _halved(axes, var, relations, lambda found: growing_bytes(definition, found), fits)


def demand_allowed(definition: Definition, axes: Axes, workload: str) -> None:
    """Raise DefinitionError for a constraint on axes alone that does not hold, before anything is drawn."""
    for broken in _relations(definition, set(definition.axes)).faults(axes):
        raise DefinitionError(definition.file, "constraints", f"{broken} (workload {workload})")


def twin_of(
    definition: Definition, workloads: Iterable[Workload], above: float = TWIN_ABOVE, most: float = TWIN_BYTES
) -> Definition | None:
    """The same op and reference with smaller constants; None for a definition whose weights are small enough.

    Weights of more than `above` bytes become at most `most`.

    Raises DefinitionError when the constraints, with the scalars of these workloads, allow no smaller one.
    """
    if weight_bytes(definition) <= above:
        return None
    relations = _relations(definition, set(constants(definition)), _scalars(workloads))
    whole = weight_bytes(definition)
    heavy = [name for name, size in weights(definition).items() if size > _HEAVY * whole]
    names = {axis for name in heavy for axis in definition.inputs[name].shape or ()}

    def made(axes: Axes) -> Definition:
        values = {name: replace(axis, value=axes.get(name)) for name, axis in definition.axes.items()}
        return replace(definition, name=f"{definition.name}~twin", axes=values)

    def size(axes: Axes) -> float:
        return weight_bytes(made(axes))

    def fits(axes: Axes) -> bool:
        return size(axes) <= most

    try:
        return made(_halved(constants(definition), names, relations, size, fits, evenly=True))
    except CannotShrink as error:
        raise DefinitionError(definition.file, "constraints", f"leave no twin of {told_bytes(most)}: {error}") from None


def constants(definition: Definition) -> Axes:
    """The const axes and their values."""
    return {name: axis.value for name, axis in definition.axes.items() if axis.value is not None}


def changes(before: Mapping[str, int], after: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """From what to what, by axis."""
    return {name: (value, after[name]) for name, value in before.items() if after[name] != value}


def told_changes(changed: Mapping[str, tuple[int, int]]) -> str:
    """The same in words: num_pages 989669 -> 61854."""
    return ", ".join(f"{name} {old} -> {new}" for name, (old, new) in changed.items())


def _halved(
    axes: Axes,
    names: Collection[str],
    relations: _Relations,
    size: Callable[[Axes], float],
    fits: Callable[[Axes], bool],
    *,
    evenly: bool = False,
) -> Axes:
    """Halve what gives back most, or, `evenly`, what has been halved least, so that no axis is worn down alone."""
    found = axes
    while not fits(found):
        ways = [
            (axes[name] // one[name] if evenly else 0, size(one), one)
            for name, one in _halves(found, names, relations)
            if size(one) < size(found)
        ]
        if not ways:
            raise CannotShrink(f"{found} is the smallest size that the constraints allow")
        found = min(ways, key=lambda way: way[:2])[2]
    return found


def _halves(axes: Axes, names: Collection[str], relations: _Relations) -> Iterator[tuple[str, Axes]]:
    for name in sorted(names):
        if axes[name] > 1:
            one = relations.with_axis(axes, name, axes[name] // 2)
            if one is not None:
                yield name, one


def _scalars(workloads: Iterable[Workload]) -> tuple[Mapping[str, Scalar], ...]:
    """The different sets of scalars that the workloads give."""
    given = ({name: spec.value for name, spec in each.inputs.items() if spec.value is not None} for each in workloads)
    return tuple({repr(scalars): scalars for scalars in given}.values()) or ({},)


def _relations(
    definition: Definition, axes: Collection[str], given: tuple[Mapping[str, Scalar], ...] = ({},)
) -> _Relations:
    constraints = [Constraint(text) for text in definition.constraints]
    known = {*axes, *given[0]}
    hold = tuple(each for each in constraints if any(name in axes for name in each.names) and known >= set(each.names))
    alone = (each for each in hold if set(each.names) <= set(axes))
    return _Relations(tuple(equation for each in alone for equation in _equations(each)), hold, given)


def _equations(constraint: Constraint) -> Iterator[_Equation]:
    tree = ast.parse(constraint.text, mode="eval").body
    if not (isinstance(tree, ast.Compare) and len(tree.ops) == 1 and isinstance(tree.ops[0], ast.Eq)):
        return
    left, right = tree.left, tree.comparators[0]
    if isinstance(left, ast.Name):
        names = tuple(name for name in constraint.names if name != left.id)
        yield _Equation(left.id, ast.unparse(right), names, _factor(right))


def _factor(expression: ast.expr) -> int | None:
    """c of `c * axis` and of `axis`."""
    if isinstance(expression, ast.Name):
        return 1
    if (
        isinstance(expression, ast.BinOp)
        and isinstance(expression.op, ast.Mult)
        and isinstance(expression.right, ast.Name)
    ):
        constant = expression.left
        return constant.value if isinstance(constant, ast.Constant) and isinstance(constant.value, int) else None
    return None

"""What a workload binds: every var axis and, of a constant, less where that says the same of the op.

Few tokens can be drawn often, and a sampler is the same for them. Weights are shared by all workloads, so that their
axes stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refgrid.dataset.definition import Definition


def fault_of(definition: Definition, name: str, value: int) -> str:
    """Why a workload may not bind this axis to that value; empty where it may."""
    if name not in definition.axes:
        return "is bound by the workload but is no axis"
    most = definition.axes[name].value
    if most is None:
        return ""
    if not 0 < value < most:
        return f"is bound by the workload to {value}, but should be above 0 and below the definition's constant, {most}"
    specs = {**definition.inputs, **definition.outputs}
    of = [weight for weight, spec in specs.items() if name in (spec.shape or ()) and definition.is_weight(weight)]
    return f"is bound by the workload, but is an axis of {of[0]}, which all workloads share" if of else ""


def with_constants(definition: Definition, axes: Mapping[str, int]) -> Definition:
    """The same with the constants that a workload runs with, given the values of all axes."""
    known = {name: replace(axis, value=axis.value and axes[name]) for name, axis in definition.axes.items()}
    return definition if known == definition.axes else replace(definition, axes=known)

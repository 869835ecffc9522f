"""Inputs of a workload: seeded, structured as the op demands, and the same numbers on every machine.

Numbers come from integer draws of the CPU generator and a table of rounded normal quantiles, so that neither vector
instructions nor a maths library change them. Each input has a seed of its own, derived from names alone. Which builder
makes which input is `rules.RULES`.
"""

from __future__ import annotations

from pathlib import Path

from refgrid.dataset.definition import Definition, Workload
from refgrid.proving.inputs.drawing import Drawing, Inputs, Value, forget_weights
from refgrid.proving.inputs.rules import turn

__all__ = ["Drawing", "Inputs", "Value", "forget_weights", "make_inputs"]


def make_inputs(
    definition: Definition,
    workload: Workload,
    seed: int,
    device: str,
    root: Path | None,
    weights_seed: int | None = None,
) -> Inputs:
    """Draw the inputs of one workload on the CPU generator and place them on `device`.

    Tensors of constant shape (weights) depend on the definition and `weights_seed` (default: `seed`) alone and are kept
    until others come.
    Raises DefinitionError for an open axis, a constraint that does not hold, a file that does not fit, or an input
    that nothing says how to draw.
    """
    drawing = Drawing(definition, workload, seed, device, root, weights_seed)
    forget_weights(but_of=(definition.name, drawing.weights_seed))
    for name in sorted(definition.inputs, key=lambda name: turn(definition.op_type, name)):
        drawing.demand_constraints(whole=False)
        drawing.values[name] = drawing.make(name)
    drawing.demand_constraints(whole=True)
    return Inputs({name: drawing.values[name] for name in definition.inputs}, drawing.digest.hexdigest())

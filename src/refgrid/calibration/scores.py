"""Chosen indices are calibrated by the scores that they were chosen by: as the reference saw them, and as others do.

Two that choose by scores no further apart than some error take keys whose sorted scores differ by twice that, so that
the error of the scores is what a comparison of choices may need, at any number of candidates. The sorted scores
themselves hardly ever differ in so few draws: only where two stand closer than the error, on both sides of the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from refgrid.calibration.rounding import FORMULA, REFERENCE
from refgrid.dataset.reference import compile_reference
from refgrid.proving.chosen import scores_at
from refgrid.proving.forms import form_of, is_law
from refgrid.proving.outputs import Tensors, named
from refgrid.proving.precision import chosen_by
from refgrid.proving.workbench import Laid

DTYPE = "float32"  # what kernels give scores in, so that the formula in it is the reference itself


def is_chosen(op: str, output: str) -> bool:
    """Whether an output is indices of the best, and not drawn."""
    form = form_of(op, output)
    return form is not None and not form.drawn


def scores(
    laid: Laid, output: str, truths: Mapping[str, Tensors], exact: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Of the keys that the reference chose, [rows, k], the scores by who gives them, and those in float64.

    A truth that gives indices alone has none.
    """
    run = compile_reference(laid.definition)
    result, (seen,) = chosen_by(lambda: run(*laid.inputs.tensors.values()))
    index = named(result, laid.definition)[output]
    seen = torch.nn.functional.pad(seen, (0, index.shape[1] - seen.shape[1]), value=-math.inf)
    laws = {who: given[output] for who, given in truths.items() if output in given}
    theirs = {who: scores_at(index, law) for who, law in laws.items() if is_law(laid.op, output, law)}
    return {REFERENCE: seen, FORMULA: seen, **theirs}, scores_at(index, exact)

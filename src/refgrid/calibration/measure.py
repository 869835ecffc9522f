"""Measures: each chosen workload drawn with many seeds, and everyone's distance from float64 and from each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch

from refgrid.calibration.chosen import SHARING
from refgrid.calibration.distance import Distance, distance
from refgrid.calibration.rounding import FLOAT64, FORMULA, REFERENCE, UNIT, least_rtol
from refgrid.calibration.scores import DTYPE, is_chosen, scores
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, DefinitionError
from refgrid.dataset.reference import compile_reference
from refgrid.proving.finding import judge
from refgrid.proving.forms import form_of
from refgrid.proving.inputs import forget_weights
from refgrid.proving.outputs import Tensors
from refgrid.proving.precision import in_dtype
from refgrid.proving.tolerance import uncalibrated
from refgrid.proving.workbench import Laid, Workbench
from refgrid.sources import Sources

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, order=True)
class Subject:
    """Whose output is held against what: `who` a source, the reference, the formula; `against` float64 or a source."""

    op: str
    dtype: str
    output: str
    who: str
    against: str


Draws: TypeAlias = dict[Subject, list[Distance]]


class Measurer:
    """Measures cases on one device, one draw at a time."""

    def __init__(self, dataset: DataSet, sources: Sources, device: str) -> None:
        self._bench = Workbench(dataset, sources, device, sharing=SHARING[device])
        self._sources, self._device = sources, device
        self.draws: Draws = defaultdict(list)
        self.absent: dict[str, str] = {}  # "source, case" -> why it gave nothing there

    def measure(self, case: Case, seeds: Iterable[int]) -> None:
        """Add the distances of these draws of a case's workload, of outputs that are not random."""
        outputs = self._bench.dataset.definitions[case.definition].outputs
        if not any(is_chosen(case.op, name) or _calibrates(case.op, name, outputs[name].dtype) for name in outputs):
            return
        for seed in seeds:
            draw = replace(case, seed=seed)
            try:
                self._draw(draw)
            except DefinitionError:  # no draw of it can do better
                raise
            except Exception as error:  # noqa: BLE001 - other draws and ops are still to be measured; `broken` tells it
                self._missing(REFERENCE, draw, error)
        self._bench.clear()
        forget_weights()  # a process that waits for its next task holds nothing that another may need

    def _draw(self, case: Case) -> None:
        laid, op = self._bench.lay(case), case.op
        dtypes = {name: spec.dtype for name, spec in laid.definition.outputs.items()}
        outputs = [name for name, dtype in dtypes.items() if _calibrates(op, name, dtype)]
        exact, reference = self._bench.referee(laid), self._bench.reference(laid)
        formula, truths = self._formula(laid, outputs), self._truths(laid, case)
        found = {REFERENCE: reference, FORMULA: formula, **truths}
        for name, dtype in dtypes.items():
            if name in outputs:
                given = {who: tensors[name] for who, tensors in found.items() if name in tensors}
                self._hold(Subject(op, dtype, name, REFERENCE, FLOAT64), given, exact[name])
            elif is_chosen(op, name):
                self._hold(Subject(op, DTYPE, name, REFERENCE, FLOAT64), *scores(laid, name, truths, exact[name]))

    def _hold(self, subject: Subject, found: Mapping[str, torch.Tensor], exact: torch.Tensor) -> None:
        """One output of everyone against float64, and the reference's against each source's."""
        for who, tensor in found.items():
            kept = uncalibrated(subject.op, subject.dtype, subject.output, f"{who} on {self._device}").rtol
            self._add(replace(subject, who=who), tensor, exact, kept)
            if who not in (REFERENCE, FORMULA):
                self._add(replace(subject, against=who), found[REFERENCE], tensor, kept)

    def _add(self, subject: Subject, actual: torch.Tensor, expected: torch.Tensor, kept: float) -> None:
        if expected.numel():
            rtols = {"rounding": UNIT[subject.dtype], "least": least_rtol(subject.dtype), "kept": kept}
            self.draws[subject].append(distance(actual, expected, rtols))

    def _formula(self, laid: Laid, outputs: Sequence[str]) -> Tensors:
        """The reference's text with each step rounded to the dtype of the output that is looked at."""
        run, found = compile_reference(laid.definition), {}
        for dtype in dict.fromkeys(laid.definition.outputs[name].dtype for name in outputs):
            result = in_dtype(lambda given: run(*given.values()), laid.inputs.tensors, getattr(torch, dtype))
            named = dict(zip(laid.definition.outputs, result if isinstance(result, tuple) else (result,), strict=True))
            found.update({name: named[name] for name in outputs if laid.definition.outputs[name].dtype == dtype})
        return found

    def _truths(self, laid: Laid, case: Case) -> dict[str, Tensors]:
        truths = {}
        for source in self._sources.serving(case.op):
            try:
                truths[source] = self._bench.truth(laid, case, source)
            except Exception as error:  # noqa: BLE001 - judged and told below
                self._missing(source, case, error)
        return truths

    def _missing(self, who: str, case: Case, error: Exception) -> None:
        verdict, reason = judge(error)
        where = case.id if verdict.colour == "red" else case.name  # what is not there, is not for any seed
        self.absent[f"{who}, {where}"] = f"{verdict.value}: {reason}"


def told(draws: Mapping[Subject, Sequence[Distance]]) -> list[dict[str, Any]]:
    """As data: of each subject the percentiles over its draws of a draw's largest errors."""
    return [_row(subject, draws[subject]) for subject in sorted(draws)]


def _row(subject: Subject, distances: Sequence[Distance]) -> dict[str, Any]:
    rows = [each.row for each in distances if each.row is not None]
    return {
        **asdict(subject),
        "draws": len(distances),
        "abs": percentiles([each.abs for each in distances]),
        "rel": percentiles([each.rel for each in distances]),
        **{f"beyond_{name}": percentiles([each.beyond[name] for each in distances]) for name in distances[0].beyond},
        "row": percentiles(rows) if rows else None,
    }


def percentiles(values: Sequence[float]) -> list[float]:
    """The smallest value that so many percent of the draws do not exceed."""
    ranked = sorted(values)
    places = (max(0, -(-len(ranked) * percent // 100) - 1) for percent in PERCENTILES)
    return [float(f"{ranked[place]:.4g}") for place in places]


def _calibrates(op: str, output: str, dtype: str) -> bool:
    return dtype in UNIT and form_of(op, output) is None

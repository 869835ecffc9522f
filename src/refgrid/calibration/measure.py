"""Measures: each chosen workload drawn with many seeds, and everyone's distance from float64 and from each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch

from refgrid.calibration.distance import Distance, distance
from refgrid.calibration.rounding import FLOAT64, FORMULA, REFERENCE, UNIT, least_rtol
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, DefinitionError
from refgrid.dataset.reference import compile_reference
from refgrid.proving.finding import judge
from refgrid.proving.forms import form_of
from refgrid.proving.outputs import Tensors
from refgrid.proving.precision import in_dtype
from refgrid.proving.tolerance import uncalibrated
from refgrid.proving.workbench import Laid, Workbench
from refgrid.sources import Sources

PERCENTILES = (50, 90, 99, 100)
# How many draws in a row have the same weights. On a GPU these are of the definition's own size, so that drawing them
# takes longer than all that is measured with them; each token then goes through others of them.
_SHARING = {"cpu": 1, "cuda": 40}


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
        self._bench = Workbench(dataset, sources, device, sharing=_SHARING[device])
        self._sources, self._device = sources, device
        self.draws: Draws = defaultdict(list)
        self.absent: dict[str, str] = {}  # "source, case" -> why it gave nothing there

    def measure(self, case: Case, seeds: Iterable[int]) -> None:
        """Add the distances of these draws of a case's workload, of outputs that are compared as numbers."""
        outputs = self._bench.dataset.definitions[case.definition].outputs
        if not any(_calibrates(case.op, name, spec.dtype) for name, spec in outputs.items()):
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

    def _draw(self, case: Case) -> None:
        laid = self._bench.lay(case)
        outputs = [name for name, spec in laid.definition.outputs.items() if _calibrates(case.op, name, spec.dtype)]
        exact, reference = self._bench.referee(laid), self._bench.reference(laid)
        found = {REFERENCE: reference, FORMULA: self._formula(laid, outputs), **self._truths(laid, case)}
        for name in outputs:
            dtype = laid.definition.outputs[name].dtype
            for who, tensors in found.items():
                if name in tensors:
                    kept = uncalibrated(case.op, dtype, name, f"{who} on {self._device}").rtol
                    self._add(Subject(case.op, dtype, name, who, FLOAT64), tensors[name], exact[name], kept)
                    if who not in (REFERENCE, FORMULA):
                        subject = Subject(case.op, dtype, name, REFERENCE, who)
                        self._add(subject, reference[name], tensors[name], kept)

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
        "abs": _percentiles([each.abs for each in distances]),
        "rel": _percentiles([each.rel for each in distances]),
        **{f"beyond_{name}": _percentiles([each.beyond[name] for each in distances]) for name in distances[0].beyond},
        "row": _percentiles(rows) if rows else None,
    }


def _percentiles(values: Sequence[float]) -> list[float]:
    """The smallest value that so many percent of the draws do not exceed."""
    ranked = sorted(values)
    places = (max(0, -(-len(ranked) * percent // 100) - 1) for percent in PERCENTILES)
    return [float(f"{ranked[place]:.4g}") for place in places]


def _calibrates(op: str, output: str, dtype: str) -> bool:
    return dtype in UNIT and form_of(op, output) is None

"""Plants mutants at one workload and says what became of each: caught, survived, or nothing changed.

Inputs are drawn once a workload and truths computed once, for all mutants that are planted there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from refgrid.dataset.case import Case, Check, Size, op_of, size_of
from refgrid.dataset.definition import DataSet
from refgrid.dataset.reference import compile_reference
from refgrid.dataset.smaller import twin_of
from refgrid.mutants import baseline
from refgrid.mutants.planting import planted_adapters, planted_reference
from refgrid.mutants.table import Mutant, Place
from refgrid.proving.finding import judge
from refgrid.proving.forms import drawn_outputs, form_of
from refgrid.proving.outputs import Tensors, named, same_bits
from refgrid.proving.proof import Prover
from refgrid.proving.settings import kept_settings
from refgrid.proving.workbench import constants_of
from refgrid.sources import Adapter, Sources

# Bytes of the weights of a twin in which mutants are planted: the fault is the same, and it is proven at many sizes.
TWIN_BYTES = 2**22

# A source and a check that a case is held to; agreement and determinism have no source.
Held = tuple[str | None, Check]
Fate = Literal["caught", "survived", "rounding", "same", "not-run"]


@dataclass(frozen=True)
class Judgement:
    """What became of a mutant at one workload.

    `fate`: caught (a case turned red, or the process ended), same (what the fault could change is bit for bit that of
    the sound code), rounding (it moved by no more than a rounding of its dtype), survived (it moved by more), not-run
    (nothing that the mutant is held against can serve here). `against` is the source or the check that caught it;
    `change` the largest change where nothing did, in roundings. `fixed` says which of the documents' checks are red,
    where they have one.
    """

    workload: str
    fate: Fate
    verdict: str = ""
    against: str = ""
    reason: str = ""
    change: float = 0.0
    fixed: Mapping[str, bool] = field(default_factory=dict)


def planted_in(dataset: DataSet, place: Place) -> DataSet:
    """The data set of the place's definition alone, or of its twin. Raises KeyError for an unknown definition."""
    definition, workloads = dataset.definitions[place.definition], dataset.workloads[place.definition]
    if place.twin:
        definition = twin_of(definition, workloads, TWIN_BYTES, TWIN_BYTES) or definition
    return DataSet(dataset.root, {definition.name: definition}, {definition.name: workloads})


def sizes(dataset: DataSet) -> dict[str, Size]:
    """The size of each workload of the one definition."""
    (definition,) = dataset.definitions.values()
    return {each.uuid: size_of(definition, each) for each in dataset.workloads[definition.name]}


def checks_of(mutant: Mutant, serving: Sequence[str]) -> list[Held]:
    """What the case is held to where these sources serve its op, the mutant's own place first."""
    own = mutant.where.source
    checks: list[Held] = [(own, "numerics"), (None, "agreement")]
    if not mutant.adapter:
        others = [name for name in serving if name != own]
        checks = [(own, "numerics"), *((name, "numerics") for name in others), (None, "determinism")]
    return sorted(checks, key=lambda each: each[1] != mutant.check)


class Bench:
    """One workload of one definition, at which the sound code and any of its mutants are proven."""

    def __init__(self, dataset: DataSet, workload: str, sources: Sources, device: str = "cpu") -> None:
        """`dataset` holds one definition, as `planted_in` gives it."""
        (self.definition,) = dataset.definitions.values()
        self.workload, self.sources, self.device = workload, sources, device
        self.op = op_of(self.definition, sources.ops)
        self.prover = Prover(dataset, sources, device)
        self._laid = self.prover.bench.lay(self._case(None, "shape"))
        self._planted: Mapping[str, Adapter] = {}
        self._sound: dict[str, Tensors] = {}
        self._truths: dict[tuple[str, str], Tensors] = {}  # for the documents' checks

    def sound(self, source: str | None, check: Check) -> str:
        """What is wrong with the sound code itself, so that a mutant's red proves nothing; "" when it is not red."""
        try:
            self.prove(source, check)
        except Exception as error:  # noqa: BLE001 - whatever it raises
            verdict, reason = judge(error)
            return f"{verdict.value}: {reason}" if verdict.colour == "red" else ""
        return ""

    def prove(self, source: str | None, check: Check = "numerics") -> None:
        """Prove what is planted, the sound code at first; raises what the proof finds."""
        self.prover.prove(self._case(source, check))

    def plant(self, mutant: Mutant | None) -> None:
        """Plant a mutant in place of the one before; None for the sound code. Raises MutantError where it cannot be."""
        text = planted_reference(self.definition, mutant) if mutant else self.definition.reference
        self._planted = planted_adapters(self.definition, self.op, mutant) if mutant else {}
        self.prover.bench.plant(self._laid, text, self._planted)

    def judge(self, mutant: Mutant, without: Collection[Held] = ()) -> Judgement:
        """Plant the mutant, prove it, and take it back; raises MutantError where it cannot be planted.

        `without`: what it is not held to, as the sound code itself is red there.
        """
        side = mutant.where.source if mutant.adapter else ""
        try:
            sound = self._sound.get(side) or self._sound.setdefault(side, self._outputs(side))
        except Exception as error:  # raised again unless its verdict is yellow: the source cannot serve here
            verdict, reason = judge(error)
            if verdict.colour != "yellow":
                raise
            return Judgement(self.workload, "not-run", reason=f"{side}: {reason}")
        self.plant(mutant)
        try:
            return self._judged(mutant, side, sound, without)
        finally:
            self.plant(None)

    def by_documents(self, source: str, inputs: str, mutant: Mutant | None) -> dict[str, bool]:
        """Which of the documents' checks on such inputs are red, of `baseline.BY_INPUTS`; for None, the sound code's.

        They have none for random samples. Raises MutantError where the mutant cannot be planted.
        """
        if drawn_outputs(self.op, self.definition):
            return {}
        laid = self._laid.inputs.tensors
        given = laid if inputs == "laid" else baseline.plain_inputs(laid)
        self.plant(mutant)
        try:
            with kept_settings():
                return self._checked(source, inputs, given, baseline.BY_INPUTS[inputs])
        finally:
            self.plant(None)

    def _judged(self, mutant: Mutant, side: str, sound: Tensors, without: Collection[Held]) -> Judgement:
        refused = ""
        held = checks_of(mutant, self.sources.serving(self.op))
        for source, check in [each for each in held if each not in without]:
            try:
                self.prove(source, check)
            except Exception as error:  # noqa: BLE001 - whatever a mutant raises is what becomes of it
                verdict, reason = judge(error)
                if verdict.colour == "red":
                    return Judgement(self.workload, "caught", verdict.value, source or check, reason)
                if source == mutant.where.source:
                    refused = f"{source}: {reason}"
        if refused:
            return Judgement(self.workload, "not-run", reason=refused)
        now = self._outputs(side)
        if all(same_bits(tensor, now[name]) for name, tensor in sound.items()):
            return Judgement(self.workload, "same")
        change = max(roundings(now[name], tensor) for name, tensor in sound.items())
        return Judgement(self.workload, "rounding" if change <= 1 else "survived", change=change)

    def _outputs(self, side: str) -> Tensors:
        """What a fault could change: outputs of the reference with its draws, or, of a source, its adapter's."""
        bench = self.prover.bench
        if side:
            return dict(bench.truth(self._laid, self._case(side, "numerics"), side))
        drawn = {f"{name}, drawn": tensor for name, tensor in bench.drawn(self._laid).items()}
        return {**{name: self._ordered(name, each) for name, each in bench.reference(self._laid).items()}, **drawn}

    def _ordered(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Choices, whose order is free, in one order."""
        form = form_of(self.op, name)
        return tensor.sort(dim=-1).values if form is not None and not form.drawn else tensor

    def _checked(
        self, source: str, kind: str, inputs: Mapping[str, Any], checks: Mapping[str, baseline.Passes]
    ) -> dict[str, bool]:
        """Their tests hand one set of inputs to the reference, then to the ground truth."""
        try:
            given = _copies(inputs)
            reference, again = self._reference(given), self._reference(_copies(inputs))
            truth = self._documents_truth(source, kind, inputs, given)
            return baseline.red(reference, again, truth, self.definition, checks)
        except Exception:  # noqa: BLE001 - which fails any test
            return dict.fromkeys(checks, True)

    def _documents_truth(self, source: str, kind: str, inputs: Mapping[str, Any], given: Mapping[str, Any]) -> Tensors:
        """Computed once for all faults of the reference that leave their inputs alone."""
        tensors = ((value, given[name]) for name, value in inputs.items() if isinstance(value, torch.Tensor))
        usual = source not in self._planted and all(same_bits(*pair) for pair in tensors)
        if usual and (kind, source) in self._truths:
            return self._truths[kind, source]
        adapter = self._planted.get(source) or self.sources.adapter(source, self.op, self.device)
        truth = dict(adapter(**given, **constants_of(adapter, self.definition)))
        if usual:
            self._truths[kind, source] = truth
        return truth

    def _reference(self, inputs: Mapping[str, Any]) -> Tensors:
        return named(compile_reference(self._laid.definition)(*inputs.values()), self.definition)

    def _case(self, source: str | None, check: Check) -> Case:
        return Case(self.definition.name, self.definition.op_type, self.op, self.workload, check, source)


def _copies(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}


def roundings(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference in roundings of the dtype, at the element's size or, below it, its row's root mean square.

    inf where a whole number, or a number that is not finite, differs.
    """
    if actual.shape != expected.shape or not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    a, e = actual.double(), expected.double()
    finite = a.isfinite() & e.isfinite()
    if not torch.equal(a.nan_to_num(0)[~finite], e.nan_to_num(0)[~finite]) or (a.isnan() != e.isnan()).any():
        return math.inf
    a, e = a.where(finite, 0), e.where(finite, 0)
    size = torch.maximum(e.abs(), e.square().mean(dim=-1, keepdim=True).sqrt()) if e.ndim else e.abs()
    error = (a - e).abs()
    ratio = torch.where(error > 0, error / (torch.finfo(expected.dtype).eps * size), 0)
    return float(ratio.max()) if ratio.numel() else 0.0

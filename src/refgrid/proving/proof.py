"""Proves one case at a time: runs reference and ground truth on the workbench, and holds one against the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce

from refgrid.dataset import memory
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet
from refgrid.dataset.smaller import twin_of
from refgrid.proving.compare import Comparison
from refgrid.proving.determinism import Side, demand_deterministic, repeat
from refgrid.proving.diagnosis import joined, mismatch_of
from refgrid.proving.finding import Finding, judge
from refgrid.proving.forms import compare_in_form, form_of, is_law
from refgrid.proving.outputs import Tensors, demand_dtypes, demand_shapes
from refgrid.proving.referee import Bound, Ruling, hold, settle, told_further
from refgrid.proving.tolerance import Tolerance, looser, tolerance_for
from refgrid.proving.workbench import Laid, Workbench
from refgrid.records.record import Verdict
from refgrid.sources import NoReferee, Sources

# Bytes of inputs and outputs up to which sources that agree are held to float64 as well.
_REFEREED = 2**26


@dataclass(frozen=True)
class Proof:
    """What a case that matched was proven with; `note` says what the truth could not show."""

    comparisons: tuple[Comparison, ...] = ()
    note: str = ""


class Prover:
    """Proves cases on one device, "cpu" or "cuda"."""

    def __init__(self, dataset: DataSet, sources: Sources, device: str, memory: float = math.inf) -> None:
        """`memory` bounds the bytes that a case may take beside what the device has free."""
        self.dataset, self.sources, self.device = dataset, sources, device
        self._bench = Workbench(dataset, sources, device, memory)

    @property
    def bench(self) -> Workbench:
        """Where it is proven, for who plants faults there."""
        return self._bench

    @property
    def seconds(self) -> Mapping[str, float]:
        """What the last case's parts took."""
        return self._bench.seconds

    @property
    def hashes(self) -> Mapping[str, str]:
        """What went into the last case."""
        return self._bench.hashes

    @property
    def axes(self) -> Mapping[str, int]:
        """Every axis of the last case's definition, as it was run."""
        return self._bench.axes

    @property
    def shrunk(self) -> Mapping[str, tuple[int, int]]:
        """From what to what the last case's axes were cut, so that it fits into memory."""
        return self._bench.shrunk

    def lighten(self) -> None:
        """Let go of the memory that the last case's workload takes, if it is much."""
        self._bench.lighten()

    def clear(self) -> None:
        """Let go of the memory that the last case's workload takes."""
        self._bench.clear()

    def prove(self, case: Case, tolerance: Tolerance | None = None) -> Proof:
        """Check one case; returns what was measured, raises Finding when the case does not match.

        `tolerance` replaces the table.

        Raises DefinitionError for a file that cannot be used, an exception with `verdict` and `reason` for a
        source that cannot serve here, and whatever the reference or the library raises.
        """
        self._bench.begin()
        checks: dict[str, Callable[[Case, Tolerance | None], Proof]] = {
            "definition": self._definition,
            "shape": self._shape,
            "dtype": self._dtype,
            "numerics": self._numerics,
            "agreement": self._agreement,
            "determinism": self._determinism,
        }
        return checks[case.check](case, tolerance)

    def _definition(self, case: Case, _: Tolerance | None) -> Proof:
        for error in self.dataset.broken:
            if error.name == case.definition:
                raise error
        definition = self.dataset.definitions[case.definition]
        twin_of(definition, self.dataset.workloads[case.definition])  # raises where the constraints leave none
        raise Finding(Verdict.ERROR, f"{case.definition}: has no workload, so nothing could be proven")

    def _shape(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._bench.lay(case)
        demand_shapes("reference", self._bench.reference(bench), bench)
        return Proof()

    def _dtype(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._bench.lay(case)
        demand_dtypes("reference", self._bench.reference(bench), bench)
        return Proof()

    def _numerics(self, case: Case, tolerance: Tolerance | None) -> Proof:
        if case.source is None:
            raise Finding(Verdict.NO_GROUND_TRUTH, f"no source serves {case.op}")
        bench = self._bench.lay(case)
        reference, truth = self._bench.reference(bench), self._bench.truth(bench, case, case.source)
        demand_shapes("reference", reference, bench)
        demand_dtypes("reference", reference, bench)
        actual = {**reference, **self._bench.drawn(bench)}
        with self._bench.timed("compare"):
            comparisons = self._compare(actual, truth, case, [case.source], tolerance)
        where = f"[{case.definition}, reference against {case.source}]"
        if wrong := mismatch_of(comparisons, bench, actual, truth, where):
            sides = {"reference": reference, case.source: truth}
            wrong = self._refereed(wrong, sides, partial(self._bench.referee, bench), self._bound_of(case, tolerance))
            mine = Side("the reference", actual, lambda: self._reference_again(bench))
            raise self._repeated(wrong, [(mine, self._side(bench, case, case.source, truth))], case, tolerance)
        missing = [name for name in reference if name not in truth]
        return Proof(comparisons, f"{', '.join(missing)}: not given by {case.source}" if missing else "")

    def _agreement(self, case: Case, tolerance: Tolerance | None) -> Proof:
        bench = self._bench.lay(case)
        truths, absent = self._all_truths(bench, case)
        note = self._demand_two(case, truths, absent)
        first, *others = sorted(truths, key=lambda name: not _gives_law(case.op, truths[name]))
        comparisons: list[Comparison] = []
        wrong: dict[str, Finding] = {}
        for other in others:
            with self._bench.timed("compare"):
                found = self._compare(truths[other], truths[first], case, [first, other], tolerance)
            where = f"[{case.definition}, {other} against {first}]"
            if mismatch := mismatch_of(found, bench, truths[other], truths[first], where):
                wrong[other] = mismatch
            comparisons += found
        if wrong:
            bound, told = self._bound_of(case, tolerance), joined(list(wrong.values()), comparisons)
            told = self._refereed(told, truths, partial(self._bench.referee, bench), bound)
            one, *sides = (self._side(bench, case, name, truths[name]) for name in (first, *wrong))
            raise self._repeated(told, [(one, side) for side in sides], case, tolerance)
        further = self._against_exact(bench, case, truths, tolerance)
        return Proof(tuple(comparisons), "; ".join(part for part in (note, further) if part))

    def _demand_two(self, case: Case, truths: Mapping[str, Tensors], absent: Mapping[str, tuple[Verdict, str]]) -> str:
        """Sources that run one kernel are one truth; records what each is declared to run, returns who counts once."""
        kernels = {name: self.sources.kernel(name, case.op) for name in truths}
        self._bench.hashes["kernels"] = "; ".join(f"{name}: {kernel}" for name, kernel in kernels.items())
        alike = {kernel: [name for name in kernels if kernels[name] == kernel] for kernel in kernels.values()}
        note = "; ".join(f"{' and '.join(n)} ran {k}: one truth" for k, n in alike.items() if len(n) > 1)
        if len(alike) >= 2:
            return note
        why = "; ".join([*(f"{name}: {reason}" for name, (_, reason) in absent.items()), *([note] if note else [])])
        verdicts = [verdict for verdict, _ in absent.values()] or [Verdict.NO_GROUND_TRUTH]
        worst = min(verdicts, key=list(Verdict).index)
        raise Finding(worst, f"agreement needs two sources and has {list(truths)} ({why})")

    def _against_exact(
        self, bench: Laid, case: Case, truths: Mapping[str, Tensors], tolerance: Tolerance | None
    ) -> str:
        """Who of the sources that agree is yet far further from float64 than another, in words.

        They may be wrong together: where none of them is float64, a small workload is held to it. Float64 is computed
        for no larger one.
        """
        if given := [name for name in self.sources.exact(case.op) if name in truths]:
            others = {name: tensors for name, tensors in truths.items() if name not in given}
            with self._bench.timed("compare"):
                return told_further(hold(others, truths[given[0]], self._bound_of(case, tolerance)), truths[given[0]])
        if case.size != "small" or memory.bytes_needed(bench.definition, bench.axes) > _REFEREED:
            return ""
        with suppress(NoReferee):  # nothing is known to be wrong
            return self._demand_exact(bench, case, truths, self._bench.referee(bench), tolerance)
        return ""

    def _demand_exact(
        self, bench: Laid, case: Case, truths: Mapping[str, Tensors], exact: Tensors, tolerance: Tolerance | None
    ) -> str:
        bound = self._bound_of(case, tolerance)
        held = hold(truths, exact, bound)
        wrong: list[Finding] = []
        pairs: list[tuple[Side, Side]] = []
        for name, truth in truths.items():
            found = tuple(each.comparison for each in held if each.side == name)
            rounded = {each.output: exact[each.output].to(truth[each.output].dtype) for each in found}
            if mismatch := mismatch_of(found, bench, truth, rounded, f"[{case.definition}, {name} against float64]"):
                wrong.append(mismatch)
                pairs.append((Side("float64", rounded, rounded.copy), self._side(bench, case, name, truth)))
        if wrong:
            told = joined(wrong, [each.comparison for each in held], "the sources agree with each other, but ")
            raise self._repeated(self._refereed(told, truths, lambda: exact, bound), pairs, case, tolerance)
        return told_further(held, exact)

    def _refereed(
        self, found: Finding, sides: Mapping[str, Tensors], exact: Callable[[], Tensors], bound: Bound
    ) -> Finding:
        """The mismatch, and what float64 says of it; it stays one, whoever is further off."""
        outputs = list(dict.fromkeys(each.output for each in found.comparisons if not each.matches))
        if not outputs:  # nan on both sides, of which it says nothing
            return found
        try:
            told, outliers = settle(outputs, sides, exact(), bound)
        except Exception as error:  # noqa: BLE001 - a referee that fails must not hide what was found
            told, outliers = Ruling(f"no word from float64: {judge(error)[1]}", frozenset())
        reason = "; ".join(part for part in (found.reason, told) if part)
        return Finding(found.verdict, reason, found.comparisons, found.report, outliers)

    def _bound_of(self, case: Case, tolerance: Tolerance | None) -> Bound:
        """A side's own tolerance, or what replaces the table."""
        outputs = self.dataset.definitions[case.definition].outputs
        return lambda side, name: (
            tolerance or tolerance_for(case.op, outputs[name].dtype, name, truth=f"{side} on {self.device}")
        )

    def _determinism(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._bench.lay(case)
        demand_deterministic(self._bench, bench, case)
        return Proof()

    def _repeated(
        self, found: Finding, pairs: Sequence[tuple[Side, Side]], case: Case, tolerance: Tolerance | None
    ) -> Finding:
        """The finding, or that sides differ from themselves: each of two that do not match is run once more."""
        notes: dict[str, None] = {}
        verdicts = {found.verdict}
        matched = all(comparison.matches for comparison in found.comparisons)  # but for nan on both sides
        for one, other in pairs:
            names = [side.name for side in (one, other) if side.name in self.sources.serving(case.op)]
            compare = partial(self._compare, case=case, truths=names, tolerance=tolerance)
            verdict, told = repeat(one, other, compare, matched)
            verdicts.add(verdict)
            notes.update(dict.fromkeys(told))
        verdict = Verdict.NONDETERMINISTIC if Verdict.NONDETERMINISTIC in verdicts else found.verdict
        reason, report = "; ".join([found.reason, *notes]), "\n".join(filter(None, [found.report, "; ".join(notes)]))
        return Finding(verdict, reason, found.comparisons, report, found.outliers)

    def _side(self, bench: Laid, case: Case, source: str, truth: Tensors) -> Side:
        return Side(source, truth, lambda: self._bench.call_truth(bench, case, source))

    def _reference_again(self, bench: Laid) -> Tensors:
        return {**self._bench.call_reference(bench), **self._bench.call_drawn(bench)}

    def _all_truths(self, bench: Laid, case: Case) -> tuple[dict[str, Tensors], dict[str, tuple[Verdict, str]]]:
        truths: dict[str, Tensors] = {}
        absent: dict[str, tuple[Verdict, str]] = {}
        for source in self.sources.serving(case.op):
            try:
                truths[source] = self._bench.truth(bench, case, source)
            except Exception as error:  # raised again unless its verdict is yellow: the source cannot serve here
                verdict, reason = judge(error)
                if verdict.colour != "yellow":
                    raise
                absent[source] = (verdict, reason)
        return truths, absent

    def _compare(
        self, actual: Tensors, expected: Tensors, case: Case, truths: Sequence[str], tolerance: Tolerance | None
    ) -> tuple[Comparison, ...]:
        """`truths` are the sources on either side, whose own precision bounds what can be asked."""
        found = []
        for name in (name for name in expected if name in actual):
            dtype = self.dataset.definitions[case.definition].outputs[name].dtype  # a twin's is the same
            if form_of(case.op, name):
                dtype = "float32"  # of the law, in which its numbers are compared
            bounds = [tolerance_for(case.op, dtype, name, truth=f"{truth} on {self.device}") for truth in truths]
            bound = tolerance or reduce(looser, bounds)
            found.append(compare_in_form(case.op, name, actual[name], expected[name], bound))
        if not found:
            raise Finding(Verdict.ERROR, f"nothing to compare: {list(actual)} and {list(expected)} share no output")
        return tuple(found)


def _gives_law(op: str, truth: Tensors) -> bool:
    """Whether a source tells what is possible: draws of two kernels alone would let an impossible one pass."""
    return any(is_law(op, name, tensor) for name, tensor in truth.items())

"""Proves one case at a time: draws the inputs, runs reference and ground truth on copies, holds one against the other.

Inputs, reference results and truths of the latest workload are kept, so that its cases share them.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch

from refgrid.case import Case
from refgrid.compare import Comparison, compare
from refgrid.definition import DataSet, Definition
from refgrid.finding import Finding, judge
from refgrid.inputs import Inputs, make_inputs
from refgrid.record import Verdict
from refgrid.reference import compile_reference, text_hash
from refgrid.sources import Sources
from refgrid.tolerance import Tolerance, looser, tolerance_for

Tensors = dict[str, torch.Tensor]

_KEPT_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Proof:
    """What a case that matched was proven with; `note` says what the truth could not show."""

    comparisons: tuple[Comparison, ...] = ()
    note: str = ""


@dataclass
class _Bench:
    """Everything about one workload that its cases share."""

    definition: Definition
    axes: Mapping[str, int]
    inputs: Inputs
    reference: Tensors | None = None
    truths: dict[str, Tensors | Exception] = field(default_factory=dict)


class Prover:
    """Proves cases on one device, "cpu" or "cuda"."""

    def __init__(self, dataset: DataSet, sources: Sources, device: str) -> None:
        self.dataset, self.sources, self.device = dataset, sources, device
        self.seconds: dict[str, float] = {}
        self.hashes: dict[str, str] = {}
        self._key: tuple[str, str, int] | None = None
        self._bench: _Bench | None = None
        self._run: tuple[str, Callable[..., Any]] | None = None
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # as drawn, and the copy handed out

    def prove(self, case: Case, tolerance: Tolerance | None = None) -> Proof:
        """Check one case; returns what was measured, raises Finding when the case does not match.

        `tolerance` replaces the table.

        Raises DefinitionError for a file that cannot be used, an exception with `verdict` and `reason` for a
        source that cannot serve here, and whatever the reference or the library raises.
        """
        self.seconds, self.hashes = {}, {}
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
        raise Finding(Verdict.ERROR, f"{case.definition}: has no workload, so nothing could be proven")

    def _shape(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._prepare(case)
        _demand_shapes("reference", self._reference(bench), bench)
        return Proof()

    def _dtype(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._prepare(case)
        _demand_dtypes("reference", self._reference(bench), bench)
        return Proof()

    def _numerics(self, case: Case, tolerance: Tolerance | None) -> Proof:
        if case.source is None:
            raise Finding(Verdict.NO_GROUND_TRUTH, f"no source serves {case.op}")
        bench = self._prepare(case)
        reference, truth = self._reference(bench), self._truth(bench, case, case.source)
        _demand_shapes("reference", reference, bench)
        _demand_dtypes("reference", reference, bench)
        with self._timed("compare"):
            comparisons = self._compare(reference, truth, case, [case.source], tolerance)
        _demand_match(comparisons, f"[{case.definition}, reference against {case.source}]")
        missing = [name for name in reference if name not in truth]
        return Proof(comparisons, f"{', '.join(missing)}: not given by {case.source}" if missing else "")

    def _agreement(self, case: Case, tolerance: Tolerance | None) -> Proof:
        bench = self._prepare(case)
        truths, absent = self._all_truths(bench, case)
        if len(truths) < 2:
            why = "; ".join(f"{name}: {reason}" for name, (_, reason) in absent.items())
            worst = min((verdict for verdict, _ in absent.values()), key=list(Verdict).index)
            raise Finding(worst, f"agreement needs two sources and has {list(truths)} ({why})")
        first, *others = truths
        comparisons: list[Comparison] = []
        with self._timed("compare"):
            for other in others:
                shared = {name: tensor for name, tensor in truths[other].items() if name in truths[first]}
                found = self._compare(shared, truths[first], case, [first, other], tolerance)
                _demand_match(found, f"[{case.definition}, {other} against {first}]")
                comparisons += found
        return Proof(tuple(comparisons))

    def _determinism(self, case: Case, _: Tolerance | None) -> Proof:
        bench = self._prepare(case)
        first, again = self._reference(bench), self._call_reference(bench)
        for name, tensor in first.items():
            if not _same_bits(tensor, again[name]):
                differing = int((tensor != again[name]).sum())
                reason = f"{name} differs between two runs of the reference on equal inputs in {differing} elements"
                raise Finding(Verdict.NONDETERMINISTIC, reason)
        return Proof()

    def _prepare(self, case: Case) -> _Bench:
        """Inputs of the case's workload, drawn once for all its cases."""
        key = (case.definition, case.workload, case.seed)
        if self._key != key or self._bench is None:
            if self._key is None or self._key[0] != case.definition:
                self._weights.clear()
            self._key, self._bench = None, None  # let go of the last workload's memory before drawing the next
            _give_back_memory()
            definition = self.dataset.definitions[case.definition]
            workload = next(w for w in self.dataset.workloads[case.definition] if w.uuid == case.workload)
            with self._timed("inputs"):
                inputs = make_inputs(definition, workload, case.seed, self.device, self.dataset.root)
            self._bench = _Bench(definition, definition.axis_values(workload.axes), inputs)
            self._key = key
        definition = self._bench.definition
        self.hashes = {"inputs": self._bench.inputs.hash, "reference": text_hash(definition.reference)}
        return self._bench

    def _reference(self, bench: _Bench) -> Tensors:
        if bench.reference is None:
            bench.reference = self._call_reference(bench)
        return bench.reference

    def _call_reference(self, bench: _Bench) -> Tensors:
        if self._run is None or self._run[0] != bench.definition.name:
            self._run = (bench.definition.name, compile_reference(bench.definition))
        run = self._run[1]
        with self._timed("reference"):
            result = self._on_copies("reference", bench, lambda inputs: run(*inputs.values()))
        return _named(result, bench.definition)

    def _truth(self, bench: _Bench, case: Case, source: str) -> Tensors:
        if source not in bench.truths:
            try:
                bench.truths[source] = self._call_truth(bench, case, source)
            except Exception as error:  # noqa: BLE001 - kept and raised below, also for later cases
                bench.truths[source] = error
        truth = bench.truths[source]
        if isinstance(truth, Exception):
            raise truth
        return truth

    def _call_truth(self, bench: _Bench, case: Case, source: str) -> Tensors:
        with self._timed("source"):  # once a process: import, probe, self-test, compilation
            adapter = self.sources.adapter(source, case.op, self.device)
        constants = {name: bench.definition.constant(name) for name in _constants_of(adapter, bench.definition)}
        with self._timed("truth"):
            given = dict(self._on_copies(source, bench, lambda inputs: adapter(**inputs, **constants)))
        strays = [name for name in given if name not in bench.definition.outputs]
        if strays or not given:
            raise Finding(
                Verdict.ERROR, f"{source} gives {list(given)} but the outputs are {list(bench.definition.outputs)}"
            )
        _demand_shapes(source, given, bench)
        _demand_dtypes(source, given, bench)
        return given

    def _all_truths(self, bench: _Bench, case: Case) -> tuple[dict[str, Tensors], dict[str, tuple[Verdict, str]]]:
        truths: dict[str, Tensors] = {}
        absent: dict[str, tuple[Verdict, str]] = {}
        for source in self.sources.serving(case.op):
            try:
                truths[source] = self._truth(bench, case, source)
            except Exception as error:
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
            dtype = self.dataset.definitions[case.definition].outputs[name].dtype
            bounds = [tolerance_for(case.op, dtype, name, truth=f"{truth} on {self.device}") for truth in truths]
            found.append(compare(name, actual[name], expected[name], tolerance or reduce(looser, bounds)))
        if not found:
            raise Finding(Verdict.ERROR, f"nothing to compare: {list(actual)} and {list(expected)} share no output")
        return tuple(found)

    def _on_copies(self, who: str, bench: _Bench, call: Callable[[Mapping[str, Any]], Any]) -> Any:
        """Call with copies at fresh addresses; whoever writes into its inputs is an error."""
        copies = {name: self._copy(bench, name, value) for name, value in bench.inputs.tensors.items()}
        try:
            result = call(copies)
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            self._weights.clear()  # what failed half way may have written into the copy that others would get
            raise
        for name, value in bench.inputs.tensors.items():
            if isinstance(value, torch.Tensor) and not _same_bits(value, copies[name]):
                self._weights.clear()
                raise Finding(Verdict.ERROR, f"{who} changed its input {name}, which is no output of the definition")
        return result

    def _copy(self, bench: _Bench, name: str, value: Any) -> Any:
        """A clone; that of a weight, which can be a gigabyte, serves all calls of its definition unless written to."""
        if not isinstance(value, torch.Tensor):
            return value
        if not bench.definition.is_weight(name):
            return value.clone()
        kept = self._weights.get(name)
        if kept is None or kept[0] is not value:
            self._weights[name] = kept = (value, value.clone())
        return kept[1]

    @contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def _give_back_memory() -> None:
    """Workers share a GPU, and what one keeps after a large workload is missing in the others; small ones keep it."""
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > _KEPT_BYTES:
        torch.cuda.empty_cache()


def _constants_of(adapter: Callable[..., Any], definition: Definition) -> list[str]:
    """Keyword-only parameters without a default: what the definition fixes but no input shows, such as eps."""
    parameters = inspect.signature(adapter).parameters.values()
    wanted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return [name for name in wanted if name not in definition.inputs]


def _named(result: Any, definition: Definition) -> Tensors:
    """Outputs by name, from a tensor, a sequence in the definition's order, or a mapping."""
    if isinstance(result, Mapping):
        result = [result.get(name) for name in definition.outputs]
    values = list(result) if isinstance(result, tuple | list) else [result]
    if len(values) != len(definition.outputs) or not all(isinstance(value, torch.Tensor) for value in values):
        found = [type(value).__name__ for value in values]
        reason = f"reference returns {found} but the outputs are {list(definition.outputs)}, each a Tensor"
        raise Finding(Verdict.ERROR, reason)
    return dict(zip(definition.outputs, values, strict=True))


def _demand_shapes(who: str, tensors: Tensors, bench: _Bench) -> None:
    for name, tensor in tensors.items():
        wanted = bench.definition.shape(name, bench.axes) or ()
        if tuple(tensor.shape) != wanted:
            reason = f"{who}: {name}.shape = {list(tensor.shape)}, but should be {list(wanted)}"
            raise Finding(Verdict.ERROR, f"{reason} [{bench.definition.name}]")


def _demand_dtypes(who: str, tensors: Tensors, bench: _Bench) -> None:
    for name, tensor in tensors.items():
        found, wanted = str(tensor.dtype).removeprefix("torch."), bench.definition.outputs[name].dtype
        if found != wanted:
            reason = f"{who}: {name}.dtype = {found}, but should be {wanted}"
            raise Finding(Verdict.ERROR, f"{reason} [{bench.definition.name}]")


def _demand_match(comparisons: tuple[Comparison, ...], where: str) -> None:
    wrong = [comparison.describe() for comparison in comparisons if not comparison.matches]
    if wrong:
        raise Finding(Verdict.MISMATCH, f"{'; '.join(wrong)} {where}", comparisons)


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal bit for bit, so that NaN equals itself and -0.0 differs from 0.0."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    flat = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right))
    return bool(torch.equal(*flat))

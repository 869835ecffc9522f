"""The workbench: inputs of one workload at a time, and reference and ground truth run on copies of them.

Inputs, reference results and truths of the latest workload are kept, so that its cases share them.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from refgrid.dataset import memory, smaller
from refgrid.dataset.case import Case, definition_of
from refgrid.dataset.definition import DataSet, Definition, Workload
from refgrid.dataset.reference import compile_reference, text_hash
from refgrid.proving.finding import Finding, forget_locals
from refgrid.proving.forms import demand_seeded, draw, drawn_outputs, is_law, seed_draws
from refgrid.proving.inputs import Inputs, make_inputs
from refgrid.proving.outputs import Tensors, demand_dtypes, demand_own_memory, demand_shapes, named, same_bits
from refgrid.proving.precision import in_float64
from refgrid.proving.settings import demand_own_settings
from refgrid.proving.unwritten import Unwritten
from refgrid.records.record import Verdict
from refgrid.sources import Adapter, NoReferee, Sources

_KEPT_BYTES = 4 * 2**30
_ALIGNED = 512  # bytes, as CUDA's allocator aligns; a CPU's aligns to 64


@dataclass
class Laid:
    """Everything about one workload that its cases share; `drawn` are many draws of the reference's random outputs."""

    key: str
    op: str
    definition: Definition
    axes: Mapping[str, int]
    inputs: Inputs
    shrunk: dict[str, tuple[int, int]]
    reference: Tensors | None = None
    drawn: Tensors | None = None
    truths: dict[str, Tensors | Exception] = field(default_factory=dict)

    @property
    def given(self) -> dict[str, Tensors]:
        """What is held of earlier calls, by who gave it."""
        truths = {name: truth for name, truth in self.truths.items() if not isinstance(truth, Exception)}
        return {"reference": self.reference or {}, **truths}

    def clear(self) -> None:
        """Let go of all tensors, also where the traceback of a failed case still holds this."""
        self.inputs.tensors.clear()
        self.truths.clear()
        self.reference = self.drawn = None


class Workbench:
    """Runs what one case needs on one device; `seconds`, `hashes`, `axes` and `shrunk` tell of the case begun last.

    `limit` bounds the bytes of memory that a case may take; `sharing` seeds in a row have the same weights.
    """

    def __init__(
        self, dataset: DataSet, sources: Sources, device: str, limit: float = math.inf, sharing: int = 1
    ) -> None:
        self.dataset, self.sources, self.device, self.limit = dataset, sources, device, limit
        self._sharing = sharing
        self.begin()
        self._key: tuple[str, str, str, int] | None = None
        self._laid: Laid | None = None
        self._run: tuple[tuple[str, str], Callable[..., Any]] | None = None
        self._weights: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # as drawn, and the copy handed out
        self._planted: Mapping[str, Adapter] = {}
        self._addresses: dict[str, int] = {}  # of the copies that were handed out last

    def begin(self) -> None:
        """Forget what was told of the last case."""
        self.seconds: dict[str, float] = {}
        self.hashes: dict[str, str] = {}
        self.axes: Mapping[str, int] = {}
        self.shrunk: dict[str, tuple[int, int]] = {}

    def lay(self, case: Case) -> Laid:
        """Inputs of the case's workload, drawn once for all its cases.

        Raises Finding("not-run") when the definition's weights alone do not fit, DefinitionError for a size that a
        constraint forbids.
        """
        key = (case.definition, case.twin, case.workload, case.seed)
        if self._key != key or self._laid is None:
            if self._key is None or self._key[:2] != key[:2]:
                self._weights.clear()
            self._let_go()  # of the last workload's memory before drawing the next
            _give_back_memory(_KEPT_BYTES)
            definition = definition_of(self.dataset, case)
            workload, shrunk = self._fitted(definition, case)
            with self.timed("inputs"):
                weights_seed = case.seed - case.seed % self._sharing
                inputs = make_inputs(definition, workload, case.seed, self.device, self.dataset.root, weights_seed)
            axes = definition.axis_values(workload.axes)
            self._laid = Laid("/".join(map(str, key)), case.op, definition, axes, inputs, shrunk)
            self._key = key
        self.axes, self.shrunk = self._laid.axes, self._laid.shrunk
        self.hashes = {"inputs": self._laid.inputs.hash, "reference": text_hash(self._laid.definition.reference)}
        return self._laid

    def plant(self, bench: Laid, reference: str, adapters: Mapping[str, Adapter]) -> None:
        """Prove another text of the reference, and other adapters of some sources, on the inputs that are laid.

        Truths of sources that stay as they are are kept. `plant(bench, <the definition's text>, {})` takes it back.
        """
        bench.definition = replace(bench.definition, reference=reference)
        bench.reference = bench.drawn = None
        for source in {*self._planted, *adapters}:
            bench.truths.pop(source, None)
        self._planted = dict(adapters)

    def lighten(self) -> None:
        """Let go of all memory if it is much: what small cases keep is worth more to them than to others."""
        if torch.cuda.is_available() and torch.cuda.memory_reserved() > _KEPT_BYTES:
            self.clear()

    def clear(self) -> None:
        """Let go of all memory, for others on the device."""
        self._weights.clear()
        self._let_go()
        _give_back_memory(0)

    def _let_go(self) -> None:
        if self._laid is not None:
            self._laid.clear()
        self._key, self._laid, self._planted = None, None, {}

    def _fitted(self, definition: Definition, case: Case) -> tuple[Workload, dict[str, tuple[int, int]]]:
        """The workload at a size that the memory here can hold, and from what to what its axes were cut."""
        workload = next(w for w in self.dataset.workloads[case.definition] if w.uuid == case.workload)
        axes, free = definition.axis_values(workload.axes), memory.bytes_free(self.device, self.limit)
        smaller.demand_allowed(definition, axes, workload.uuid)
        try:
            fitted = smaller.fitted(definition, axes, lambda found: memory.bytes_needed(definition, found) <= free)
        except smaller.CannotShrink:
            raise Finding(Verdict.NOT_RUN, memory.told_lack(definition, free)) from None
        bound = {name: fitted[name] for name in workload.axes}
        return replace(workload, axes=bound), smaller.changes(axes, fitted)

    def reference(self, bench: Laid) -> Tensors:
        """The reference's outputs by name, computed once a workload."""
        if bench.reference is None:
            bench.reference = self.call_reference(bench)
        return bench.reference

    def drawn(self, bench: Laid) -> Tensors:
        """Many draws of each random output of the reference."""
        if bench.drawn is None:
            bench.drawn = self.call_drawn(bench)
        return bench.drawn

    def call_drawn(self, bench: Laid) -> Tensors:
        """The same draws anew."""
        run = self._compiled(bench.definition)
        with demand_own_settings("reference"), self.timed("reference"):
            return _draws("reference", bench, lambda inputs: named(run(*inputs.values()), bench.definition), ())

    def call_reference(self, bench: Laid, elsewhere: bool = False, memory: Unwritten | None = None) -> Tensors:
        """The reference's outputs by name, computed anew.

        `elsewhere`, on inputs at other addresses than last time; `memory`, what fresh one holds, otherwise as it comes.
        """
        run = self._compiled(bench.definition)
        with demand_own_settings("reference"), self.timed("reference"), memory or nullcontext():
            result = self._on_copies("reference", bench, lambda inputs: run(*inputs.values()), elsewhere)
        given = named(result, bench.definition)
        demand_own_memory("reference", given, bench.given, self._lent())
        return given

    def _compiled(self, definition: Definition) -> Callable[..., Any]:
        if self._run is None or self._run[0] != (definition.name, definition.reference):
            with demand_own_settings("reference"):
                compiled = compile_reference(definition)
            self._run = ((definition.name, definition.reference), compiled)
        return self._run[1]

    def truth(self, bench: Laid, case: Case, source: str) -> Tensors:
        """A source's outputs by name, computed once a workload; raises what the source raises, each time."""
        if source not in bench.truths:
            try:
                bench.truths[source] = self.call_truth(bench, case, source)
            except Exception as error:  # noqa: BLE001 - kept and raised below, also for later cases
                forget_locals(error)
                bench.truths[source] = error
        truth = bench.truths[source]
        if isinstance(truth, Exception):
            raise truth
        return truth

    def call_truth(self, bench: Laid, case: Case, source: str) -> Tensors:
        """The same, computed anew."""
        with self.timed("source"):  # once a process: import, probe, self-test, compilation
            adapter = self._planted.get(source) or self.sources.adapter(source, case.op, self.device)
        self._demand_room(bench, source)
        constants = constants_of(adapter, bench.definition)
        with self.timed("truth"):
            given = dict(self._on_copies(source, bench, lambda inputs: adapter(**inputs, **constants)))
        strays = [name for name in given if name not in bench.definition.outputs]
        if strays or not given:
            raise Finding(
                Verdict.ERROR, f"{source} gives {list(given)} but the outputs are {list(bench.definition.outputs)}"
            )
        demand_own_memory(source, given, bench.given, self._lent())
        laws = [name for name in given if is_law(bench.op, name, given[name])]
        numbers = {name: tensor for name, tensor in given.items() if name not in laws}
        demand_shapes(source, numbers, bench)
        demand_dtypes(source, numbers, bench)
        with self.timed("truth"):
            return {**given, **_draws(source, bench, lambda inputs: adapter(**inputs, **constants), laws)}

    def _demand_room(self, bench: Laid, source: str) -> None:
        """On a GPU libraries lay weights out for their kernels; a referee does not, and room is left for small ones."""
        held = memory.weight_bytes(bench.definition)
        if self.device == "cuda" and held > smaller.TWIN_ABOVE and source not in self.sources.exact(bench.op):
            free = memory.bytes_free(self.device, self.limit)
            if memory.bytes_laid_out_anew(bench.definition, bench.axes) > free:
                raise Finding(Verdict.NOT_RUN, memory.told_lack_for(source, bench.definition, bench.axes, free))

    def referee(self, bench: Laid) -> Tensors:
        """What each output should be, float64 from the first step to the last, so finer than the definition's dtype.

        Raises NoReferee when no provider has a formula for the op or there is no memory for it, and whatever the
        formula raises.
        """
        formula = self.sources.referee(bench.op, self.device)
        wanted = memory.bytes_in_float64(bench.definition, bench.axes)
        free = memory.bytes_free(self.device, self.limit)
        if wanted > free:
            raise NoReferee(f"{memory.told_bytes(wanted)} for it, and {memory.told_bytes(free)} are free")
        constants = {name: bench.definition.constant(name) for name in constants_of(formula, bench.definition)}
        with self.timed("referee"):
            return dict(in_float64(lambda inputs: formula(**inputs, **constants), bench.inputs.tensors))

    def _on_copies(
        self, who: str, bench: Laid, call: Callable[[Mapping[str, Any]], Any], elsewhere: bool = False
    ) -> Any:
        """Call with copies; whoever writes into its inputs is an error. `elsewhere`: not where they were last time."""
        taken = self._addresses if elsewhere else {}
        copies = {name: self._copy(bench, name, value, taken.get(name)) for name, value in bench.inputs.tensors.items()}
        self._addresses = {name: x.data_ptr() for name, x in copies.items() if isinstance(x, torch.Tensor)}
        if drawn_outputs(bench.op, bench.definition):
            seed_draws(f"{bench.key}/{who}")
        try:
            result = call(copies)
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception:
            self._weights.clear()  # what failed half way may have written into the copy that others would get
            raise
        for name, value in bench.inputs.tensors.items():
            if isinstance(value, torch.Tensor) and not same_bits(value, copies[name]):
                self._weights.clear()
                raise Finding(Verdict.ERROR, f"{who} changed its input {name}, which is no output of the definition")
        return result

    def _copy(self, bench: Laid, name: str, value: Any, taken: int | None = None) -> Any:
        """A clone; that of a weight, which can be a gigabyte, serves all calls of its definition unless written to."""
        if not isinstance(value, torch.Tensor):
            return value
        if not bench.definition.is_weight(name):
            return value.clone() if taken is None else _clone_beside(value, taken)
        kept = self._weights.get(name)
        if kept is None or kept[0] is not value:
            self._weights[name] = kept = (value, value.clone())
        return kept[1]

    def _lent(self) -> list[torch.Tensor]:
        """The copies of weights, which are the same in all calls."""
        return [copy for _, copy in self._weights.values()]

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add what the block takes to `seconds`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - started


def _clone_beside(value: torch.Tensor, taken: int) -> torch.Tensor:
    """A clone at another address than `taken`, as well aligned as the allocator's."""
    buffer = torch.empty(value.nbytes + 2 * _ALIGNED, dtype=torch.uint8, device=value.device)
    start = _ALIGNED if buffer.data_ptr() + _ALIGNED != taken else 2 * _ALIGNED
    return buffer[start : start + value.nbytes].view(value.dtype).view(value.shape).copy_(value)


def _give_back_memory(kept: int) -> None:
    """Workers share a GPU, and what one keeps after a large workload is missing in the others; small ones keep it."""
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > kept:
        torch.cuda.empty_cache()


def constants_of(adapter: Adapter, definition: Definition) -> dict[str, Any]:
    """Keyword-only parameters without a default: what the definition fixes but no input shows, such as eps."""
    parameters = inspect.signature(adapter).parameters.values()
    wanted = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return {name: definition.constant(name) for name in wanted if name not in definition.inputs}


def _draws(
    who: str, bench: Laid, call: Callable[[Mapping[str, Any]], Mapping[str, Any]], laws: Sequence[str]
) -> Tensors:
    wanted = [name for name in drawn_outputs(bench.op, bench.definition) if name not in laws]
    inputs, held = bench.inputs.tensors, dict(bench.given)

    def call_apart(inputs: Mapping[str, Any]) -> Tensors:
        given = call(inputs)
        samples = {name: given[name] for name in wanted}
        demand_own_memory(who, samples, held)
        held[f"call {len(held)} of {who}"] = samples
        return samples

    drawn = {name: draw(call_apart, inputs, bench.definition, name, f"{bench.key}/{who}/{name}") for name in wanted}
    for name, draws in drawn.items():
        demand_seeded(who, name, draws)
    return drawn

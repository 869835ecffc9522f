"""What the verdict on a mutant followed from, as digests in named parts, so that one that is older is told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from refgrid.caching.adapters import Adapters
from refgrid.caching.key import definition_hash, short, workload_row
from refgrid.caching.modules import Modules
from refgrid.dataset.case import Size, op_of
from refgrid.dataset.definition import DataSet
from refgrid.dataset.reference import text_hash
from refgrid.mutants.judging import planted_in, sizes
from refgrid.mutants.table import Mutant, Place
from refgrid.proving.tolerance import tolerance_for
from refgrid.sources import Sources

_TOLERANCE = "refgrid.proving.tolerance"


class Parts:
    """The parts of verdicts on the mutants of one data set, as of today."""

    def __init__(self, dataset: DataSet, sources: Sources) -> None:
        self._dataset, self._sources, self._adapters = dataset, sources, Adapters(sources)
        self._of_place: dict[Place, tuple[DataSet, Mapping[str, Size]]] = {}
        self._known: dict[tuple[Place, str, Size], dict[str, str]] = {}

    def of(self, mutant: Mutant, device: str, size: Size) -> dict[str, str]:
        """The parts of one mutant on one device at one size; raises KeyError for a place that is not there."""
        at = (mutant.where, device, size)
        if at not in self._known:
            self._known[at] = self._made(*at)
        return self._known[at]

    def _made(self, place: Place, device: str, size: Size) -> dict[str, str]:
        planted, by_size = self._planted(place)
        (definition,) = planted.definitions.values()
        op = op_of(definition, self._sources.ops)
        workloads = [each for each in planted.workloads[definition.name] if by_size[each.uuid] == size]
        return {
            "reference": text_hash(definition.reference)[:12],
            "adapter": self._adapters.hash(place.source, op) or "none",
            "definition": definition_hash(definition),
            "workloads": short([workload_row(each, planted.root) for each in workloads]),
            "tolerance": short(sorted(self._tolerances(planted, op, device))),
            "instrument": self._instrument,
        }

    def _planted(self, place: Place) -> tuple[DataSet, Mapping[str, Size]]:
        if place not in self._of_place:
            planted = planted_in(self._dataset, place)
            self._of_place[place] = planted, sizes(planted)
        return self._of_place[place]

    def _tolerances(self, planted: DataSet, op: str, device: str) -> Iterator[str]:
        (definition,) = planted.definitions.values()
        for source in self._sources.serving(op):
            for name, spec in definition.outputs.items():
                yield f"{source} {name} {tolerance_for(op, spec.dtype, name, f'{source} on {device}')}"

    @cached_property
    def _instrument(self) -> str:
        """What draws, plants, compares and judges; its table of tolerances is a part of its own."""
        package = Modules.of("refgrid")
        reached = package.reached(("refgrid.mutants.judging",))
        return package.hash(name for name in reached if name != _TOLERANCE)[:12]

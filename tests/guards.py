"""The table of mutants, and benches at which several tests plant them: inputs are drawn and truths computed once."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from refgrid.dataset.definition import DataSet, load_dataset
from refgrid.mutants.judging import Bench, Judgement, planted_in
from refgrid.mutants.table import Mutant, Place, load_mutants
from refgrid.sources import Sources

ROOT = Path(__file__).resolve().parents[1]


@cache
def published() -> DataSet:
    """The repository's definitions and workloads, read once for all families of faults."""
    return load_dataset(ROOT)


@cache
def table() -> dict[str, Mutant]:
    """Every mutant of the repository by its id."""
    return {mutant.id: mutant for mutant in load_mutants(ROOT / "mutants")}


def places() -> list[Place]:
    """Every place of the table at which something is planted on a CPU, once."""
    found = [place for mutant in table().values() if mutant.device == "cpu" for place, _ in mutant.guarded]
    return list(dict.fromkeys(found))


@cache  # a few megabytes each: places are small
def bench(definition: str, workload: str, twin: bool) -> Bench:
    """The bench of one workload of one definition of the repository."""
    place = Place(definition=definition, workload=workload, twin=twin)
    return Bench(planted_in(published(), place), workload, Sources())


def bench_of(place: Place) -> Bench:
    """The bench of a place, shared with those that differ in their source alone."""
    return bench(place.definition, place.workload, place.twin)


def demand_caught(judgement: Judgement, mutant: Mutant, told: str) -> None:
    """Fail unless the mutant's case turned red, with the mutant's verdict and a reason that fits `told`."""
    assert judgement.fate == "caught", f"{mutant.id}: {judgement.fate}, but should be caught"
    wanted = [mutant.verdict.value, *(["nondeterministic"] if mutant.race else [])]
    told_wanted = " or ".join(wanted)
    assert judgement.verdict in wanted, (
        f"{mutant.id}: {judgement.verdict}, but should be {told_wanted}: {judgement.reason}"
    )
    assert re.search(told, judgement.reason), f"{mutant.id}: {judgement.reason!r} does not tell of {told!r}"

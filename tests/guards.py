"""The table of mutants, and benches at which several tests plant them: inputs are drawn and truths computed once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from functools import cache
from pathlib import Path
from typing import Any

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


class Here:
    """In place of a worker's process: calls the function where it is asked for, which spares the start of one."""

    def __init__(self, function: Callable[..., Any], _limit: int) -> None:
        self.call = function

    def close(self) -> None:
        """There is nothing to end."""


class AtOnce(Executor):
    """In place of a pool of threads: does what it is given before it returns.

    Functions that `Here` calls parse Python, and so does the test's own thread. CPython 3.11 cannot in two threads at
    a time once a collection runs Python, as Hypothesis's does: "AST constructor recursion depth mismatch".
    """

    def __init__(self, _threads: int) -> None:
        super().__init__()

    def submit(self, do: Callable[..., Any], /, *given: Any, **named: Any) -> Future[Any]:
        """What became of the call, done or raised."""
        told: Future[Any] = Future()
        try:
            told.set_result(do(*given, **named))
        except Exception as error:  # noqa: BLE001  # as a pool does
            told.set_exception(error)
        return told


def write_products(root: Path, before: Mapping[str, str]) -> None:
    """A data set of one small product, and mutants that do this first, then one that is wrong and one that is not."""
    for kind, end in (("definitions", "json"), ("workloads", "jsonl")):
        file = root / kind / "gemm" / f"gemm_n128_k2048.{end}"
        file.parent.mkdir(parents=True)
        text = (ROOT / kind / "gemm" / file.name).read_text()
        file.write_text(text if end == "json" else next(line for line in text.splitlines() if '"edge_m129"' in line))
    place = '[places.gemm]\ndefinition = "gemm_n128_k2048"\nworkload = "edge_m129"\nsource = "torch"\n'
    faults = [*before.items(), ("zero", "A = A * 0"), ("nothing", "A = A * 1")]
    entries = "".join(
        f'\n[[mutants]]\nname = "{name}"\nat = "gemm"\nbefore = {json.dumps(text)}\ntold = "C"\n'
        for name, text in faults
    )
    (root / "mutants").mkdir()
    (root / "mutants" / "gemm.toml").write_text(place + entries)

"""Faults of the adapters of GPU libraries: what can be known of them where there is no GPU.

`refgrid mutants --device cuda` lets the libraries' kernels run with them. Here each must stand once in its module, in
what its op runs, and those that a double of the library can tell must turn the case red through it for the reason told.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache

import pytest
from guards import demand_caught, published, table
from kernel_doubles import served_on_a_cpu

from refgrid.dataset.case import op_of
from refgrid.mutants.judging import Bench, planted_in
from refgrid.mutants.planting import module_text, planted_module
from refgrid.mutants.table import Mutant, Place
from refgrid.sources import Sources
from refgrid_groundtruth.table import FAMILY, SOURCES

FAULTS = [mutant for mutant in table().values() if mutant.device == "cuda"]

# What the doubles do not tell: they mask always, know one layout and one softplus, and want a scale.
UNSEEN = {
    "gqa_paged: adapter: no mask, FlashInfer",
    "gqa_paged: adapter: no mask, SGLang",
    "gqa_paged: adapter: heads before slots of a page, FlashInfer",
    "gqa_ragged: adapter: no mask, FlashInfer",
    "mla_ragged: adapter: no mask, FlashInfer",
    "mla_paged: adapter: no mask, FlashInfer",
    "mla_paged: adapter: scale left to the library, SGLang",
    "mamba_ssu: adapter: step without softplus, FlashInfer",
}


def doubled(mutant: Mutant) -> bool:
    """Doubles of samplers have laws of a few tokens; those of fp8 blocks round as no CPU's tolerance knows."""
    apart = mutant.adapter.endswith(".sampling") or mutant.where.definition.startswith("moe_fp8_block_scale")
    return not apart and mutant.id not in UNSEEN


SEEN = sorted(filter(doubled, FAULTS), key=lambda each: (each.where.definition, each.where.workload))


def demand_in_its_op(mutant: Mutant) -> None:
    """Fail unless the fault stands once in its module, and in functions that the adapter of its op runs alone."""
    definition = published().definitions[mutant.where.definition]
    op, sound = op_of(definition, tuple(FAMILY)), module_text(mutant)
    assert not mutant.sound or sound.count(mutant.sound) == 1, f"{mutant.id}: {mutant.sound!r} is not there once"
    own = mutant.model_copy(update={"adapter": f"{mutant.adapter.rpartition('.')[0]}.{FAMILY[op]}"})
    before, after = functions(sound), functions(planted_module(definition, op, mutant))
    known = {**functions(module_text(own)), **before}
    changed = {name for name, text in after.items() if ast.dump(text) != ast.dump(before.get(name, ast.Pass()))}
    changed.discard(f"sound_{op}")
    assert changed, f"{mutant.id}: no function is another one"
    assert changed <= reached(op, known), f"{mutant.id}: {op} does not run {sorted(changed)}"


def functions(text: str) -> dict[str, ast.stmt]:
    """Those of a module, by name; of two of one name the last, as Python has it."""
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def reached(name: str, known: Mapping[str, ast.stmt]) -> set[str]:
    """A function and all that it names, in turn."""
    found, todo = set[str](), [name]
    while todo:
        found.add(at := todo.pop())
        nodes = list(ast.walk(known[at]))
        names = {each.id for each in nodes if isinstance(each, ast.Name)}
        names |= {each.attr for each in nodes if isinstance(each, ast.Attribute)}
        todo += (names & known.keys()) - found
    return found


@pytest.mark.parametrize("mutant", FAULTS, ids=lambda mutant: mutant.id)
def test_a_fault_stands_once_in_what_its_op_runs(mutant: Mutant) -> None:
    demand_in_its_op(mutant)


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        pytest.param({"sound": "page_size", "broken": "1"}, "'page_size' is not there once", id="several times"),
        pytest.param({"sound": "run(q, k, v, ", "broken": "run(q, v, k, "}, "does not run", id="another op's"),
        pytest.param({"sound": "recommended", "broken": "enough"}, "no function is another one", id="a comment"),
    ],
)
def test_a_fault_that_would_not_run_is_told(change: Mapping[str, str], failure: str) -> None:
    mutant = table()["gqa_paged: adapter: values for keys, FlashInfer"]

    with pytest.raises(AssertionError, match=failure):
        demand_in_its_op(mutant.model_copy(update=change))


def test_every_op_type_that_a_gpu_library_serves_has_such_faults() -> None:
    libraries = [source for source in SOURCES if source.library in ("flashinfer", "sglang")]
    served = {op for source in libraries for op in source.ops}
    count = Counter(mutant.op_type for mutant in FAULTS)
    types = {one.op_type for one in published().definitions.values() if op_of(one, tuple(FAMILY)) in served}
    few = {name: count[name] for name in types if count[name] < 4}

    assert few == {}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Place], Bench]]:
    """Benches at which the doubles serve; those of one workload share it."""

    @cache
    def at(definition: str, workload: str, twin: bool) -> Bench:
        place = Place(definition=definition, workload=workload, twin=twin)
        return Bench(planted_in(published(), place), workload, Sources())

    with served_on_a_cpu(tmp_path_factory.mktemp("libraries")):
        yield lambda place: at(place.definition, place.workload, place.twin)


@pytest.mark.parametrize("mutant", SEEN, ids=lambda mutant: mutant.id)
def test_a_fault_of_an_adapter_turns_its_case_red_through_a_double(
    bench: Callable[[Place], Bench], mutant: Mutant
) -> None:
    at = bench(mutant.where)

    assert at.sound(mutant.where.source, "numerics") == ""
    demand_caught(at.judge(mutant), mutant, mutant.told)

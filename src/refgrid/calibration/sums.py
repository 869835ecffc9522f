"""Measures how the error of a row, relative to its norm, grows with the length K of the sums in it.

Each op is drawn at one K after the other, of few rows and columns, by the rules of its inputs. Measured are outputs as
they are rounded, and the float32 sums before that: as a CPU adds them, one product after the other, and sixteen exact
products at a time with what is beyond 24 bits cut off, a model of Tensor Cores.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch

from refgrid.calibration.growth import AS_HERE, CUT_OFF, ONE_BY_ONE
from refgrid.calibration.measure import percentiles
from refgrid.calibration.rounding import REFERENCE
from refgrid.dataset.case import Case
from refgrid.dataset.definition import DataSet, Definition
from refgrid.dataset.reference import compile_reference
from refgrid.environments.measured import Environment
from refgrid.proving.finding import judge
from refgrid.proving.outputs import named
from refgrid.proving.precision import in_float32
from refgrid.proving.rows import furthest_row
from refgrid.proving.workbench import Laid, Workbench
from refgrid.records.record import now
from refgrid.sources import Sources

SEEDS = 20
AT_ONCE = 16  # products of one instruction
_KEPT = 24  # bits of a float32


class Grown(NamedTuple):
    """A definition whose sums are made longer: its axes at a length, the output's dtypes, and the lengths."""

    definition: str
    output: str
    axes: Callable[[int], Mapping[str, int]]
    dtypes: tuple[str, ...]
    lengths: tuple[int, ...]


def _gemm(k: int) -> dict[str, int]:
    return {"M": 16, "N": 64, "K": k}


def _moe(k: int) -> dict[str, int]:
    """The sums of the first product are of K numbers, those of the second of 128."""
    sizes = {"seq_len": 16, "num_local_experts": 8, "hidden_size": k, "intermediate_size": 128, "gemm1_out_size": 256}
    return {**sizes, "num_hidden_blocks": k // 128, "num_intermediate_blocks": 1, "num_gemm1_out_blocks": 2}


GROWN: Mapping[str, Grown] = {
    "gemm": Grown("gemm_n128_k2048", "C", _gemm, ("float16", "bfloat16"), tuple(2**i for i in range(8, 15))),
    "moe_fp8_block_scale_renorm": Grown(
        "moe_fp8_block_scale_renorm_topk8_e128_h4096_i1536",
        "output",
        _moe,
        ("bfloat16",),
        tuple(2**i for i in range(8, 14)),
    ),
}


def ops(dataset: DataSet) -> tuple[str, ...]:
    """Those whose definition is there."""
    return tuple(op for op, grown in GROWN.items() if grown.definition in dataset.definitions)


def measured(dataset: DataSet, environment: Environment) -> dict[str, Any]:
    """As data: of each op, dtype, length and what was measured, the percentiles over draws of the furthest row."""
    found = [
        {"op": op, "dtype": dtype, "K": k, "what": what, "draws": len(rows), "row": percentiles(rows)}
        for op in ops(dataset)
        for grown in (GROWN[op],)
        for dtype in grown.dtypes
        for k in grown.lengths
        for what, rows in _errors(_at(dataset, grown, dtype, k), op, grown).items()
    ]
    return {"environment": asdict(environment), "date": now(), "seeds": SEEDS, "measured": found}


def _at(dataset: DataSet, grown: Grown, dtype: str, k: int) -> DataSet:
    """The data set of that definition alone, at one length and in one dtype, with one workload."""
    held, values = dataset.definitions[grown.definition], grown.axes(k)
    axes = {name: replace(axis, value=axis.value and values.get(name, axis.value)) for name, axis in held.axes.items()}
    bound = {name: values[name] for name, axis in held.axes.items() if axis.value is None}
    workload = replace(dataset.workloads[held.name][0], uuid=f"k{k}", axes=bound)
    definition = replace(_in_dtype(held, held.outputs[grown.output].dtype, dtype), axes=axes)
    return replace(dataset, definitions={held.name: definition}, workloads={held.name: (workload,)})


def _in_dtype(definition: Definition, before: str, after: str) -> Definition:
    def changed(specs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: replace(spec, dtype=after) if spec.dtype == before else spec for name, spec in specs.items()}

    return replace(definition, inputs=changed(definition.inputs), outputs=changed(definition.outputs))


def _errors(dataset: DataSet, op: str, grown: Grown) -> dict[str, list[float]]:
    """Of each draw the furthest row, by what was measured."""
    held, (workload,) = dataset.definitions[grown.definition], dataset.workloads[grown.definition]
    bench, errors = Workbench(dataset, Sources(), "cpu", sharing=SEEDS), defaultdict(list)
    for seed in range(SEEDS):
        case = Case(held.name, held.op_type, op, workload.uuid, "shape", seed=seed)
        laid = bench.lay(case)
        exact = bench.referee(laid)[grown.output].double()
        for what, tensor in _found(bench, laid, case, grown.output):
            row = furthest_row(tensor.double(), exact, bound=math.inf)
            errors[what].append(row.error if row else math.nan)
    bench.clear()
    return errors


def _found(bench: Workbench, laid: Laid, case: Case, output: str) -> Iterator[tuple[str, torch.Tensor]]:
    yield REFERENCE, bench.reference(laid)[output]
    for source in bench.sources.serving(case.op):
        try:
            yield source, bench.truth(laid, case, source)[output]
        except Exception as error:  # raised again unless its verdict is yellow: the source cannot serve here
            if judge(error)[0].colour != "yellow":
                raise
    run = compile_reference(laid.definition)
    yield AS_HERE, named(in_float32(lambda inputs: run(*inputs.values()), laid.inputs.tensors), laid.definition)[output]
    if case.op == "gemm":
        a, b = laid.inputs.tensors["A"], laid.inputs.tensors["B"]
        yield ONE_BY_ONE, one_by_one(a, b)
        yield CUT_OFF, cut_off(a, b)


def one_by_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B^T in float32, products of 16-bit numbers are exact there: each is added to the sum of those before."""
    total = torch.zeros(len(a), len(b))
    for x, y in zip(a.float().T, b.float().T, strict=True):
        total += x[:, None] * y
    return total


def cut_off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A B^T in float32, some products added exactly to the sum of those before, which keeps its first 24 bits."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for x, y in zip(a.double().split(AT_ONCE, dim=1), b.double().split(AT_ONCE, dim=1), strict=True):
        mantissa, exponent = torch.frexp(total + x @ y.T)
        total = torch.ldexp(torch.trunc(mantissa * 2**_KEPT), exponent - _KEPT)
    return total

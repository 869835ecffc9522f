"""Faults planted into this data set's own references: each must end in the verdict that names it.

The fault is a change of the published text, proven against the torch source on a CPU, as `nox -s matrix` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from refgrid.case import Case
from refgrid.definition import DataSet, load_dataset
from refgrid.finding import Finding
from refgrid.proof import Prover
from refgrid.record import Verdict
from refgrid.sources import Sources

ROOT = Path(__file__).resolve().parents[1]

PREFILL = ("gqa_paged_prefill_causal_h5_kv1_d128_ps64", "edge_b3_q257_n11_p16")
DECODE = ("gqa_paged_decode_h20_kv4_d128_ps64", "edge_b5_n17_p32")
NORM = ("rmsnorm_h4096", "edge_b13")
FUSED = ("fused_add_rmsnorm_h2048", "edge_b13")
GEMM = ("gemm_n128_k2048", "edge_m129")


class Fault(NamedTuple):
    """What to change in whose reference, and what must be said."""

    name: str
    where: tuple[str, str]
    sound: str
    broken: str
    told: str


FAULTS = [
    Fault("scale off by 1 %", DECODE, "sm_scale=sm_scale", "sm_scale=sm_scale * 1.01", "lse is off"),
    Fault("scale dropped", DECODE, "sm_scale=sm_scale", "sm_scale=1.0", "output is off"),
    Fault("causal mask one key too wide", PREFILL, "- length + i + 1", "- length + i + 2", "output is"),
    Fault("causal mask one key too narrow", PREFILL, "- length + i + 1", "- length + i", "output is off"),
    Fault("causal mask aligned top left", PREFILL, "kv_len[sequence, None] - length + i + 1", "i + 1", "output is"),
    Fault("pages in order", DECODE, "page = kv_indices[", "page = kv_indices.sort().values[", "output is"),
    Fault("two pages swapped", DECODE, "page = kv_indices[", "page = kv_indices.roll(1)[", "output is"),
    Fault(
        "last page taken as full", DECODE, "* page_size + kv_last_page_len", "* page_size + page_size", "output is nan"
    ),
    Fault("last page left out", DECODE, "* page_size + kv_last_page_len", "* page_size", "output is off"),
    Fault(
        "lse in base e", DECODE, "lse = m + torch.log2(total)", "lse = (m + torch.log2(total)) * 0.6931", "lse is off"
    ),
    Fault("lse without the maximum", DECODE, "lse = m + torch.log2(total)", "lse = torch.log2(total)", "lse is"),
    Fault("heads of a group mixed up", DECODE, "return output[", "return output.roll(1, 1)[", "output is off"),
    Fault(
        "nan in one element",
        DECODE,
        "return output[",
        "output[0, 0, 0] = math.nan\n    return output[",
        "output is nan",
    ),
    Fault("eps of another model", NORM, "eps=1e-05", "eps=1e-01", "output is off"),
    Fault("weight plus one", NORM, "* weight.float()", "* (weight.float() + 1)", "output is off"),
    Fault(
        "residual not added", FUSED, "x = hidden_states.float() + residual.float()", "x = residual.float()", "output is"
    ),
    Fault("residual not updated", FUSED, "x.to(residual.dtype)", "residual.clone()", "residual_out is off"),
    Fault("sum in bfloat16", GEMM, "(a @ b.float().T)", "(a.bfloat16() @ b.bfloat16().T)", "C is off"),
    Fault("b not transposed right", GEMM, "b.float().T", "b.float().flip(0).T", "C is off"),
]


@pytest.fixture(scope="module")
def dataset() -> DataSet:
    return load_dataset(ROOT)


def prove(dataset: DataSet, where: tuple[str, str], sound: str = "", broken: str = "") -> None:
    """Prove one case with the reference's text changed; the change must be one."""
    name, workload = where
    definition = dataset.definitions[name]
    assert sound in definition.reference, f"{sound!r} is not in the reference of {name}: the fault plants nothing"
    changed = replace(definition, reference=definition.reference.replace(sound, broken))
    sources = Sources()
    op = max((op for op in sources.ops if name.startswith(op)), key=len)
    case = Case(name, definition.op_type, op, workload, "numerics", "torch")
    Prover(replace(dataset, definitions={name: changed}), sources, "cpu").prove(case)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(dataset: DataSet, fault: Fault) -> None:
    with pytest.raises(Finding) as caught:
        prove(dataset, fault.where, fault.sound, fault.broken)

    assert caught.value.verdict is Verdict.MISMATCH
    assert fault.told in caught.value.reason


@pytest.mark.parametrize("where", [PREFILL, DECODE, NORM, FUSED, GEMM], ids=lambda where: where[0])
def test_the_unchanged_reference_matches_there(dataset: DataSet, where: tuple[str, str]) -> None:
    prove(dataset, where)


def test_an_output_cut_short_is_an_error_of_shape(dataset: DataSet) -> None:
    with pytest.raises(Finding, match=r"output\.shape = \[0, 4096\], but should be \[13, 4096\]") as caught:
        prove(dataset, NORM, "return y.to(hidden_states.dtype)", "return y[:0].to(hidden_states.dtype)")

    assert caught.value.verdict is Verdict.ERROR


def test_a_truth_that_fails_half_way_leaves_no_damaged_weight_to_others(dataset: DataSet) -> None:
    name, workload = GEMM
    case = Case(name, "gemm", "gemm", workload, "numerics", "spoiler")

    def adapter(source: str, _op: str, _device: str) -> Callable[..., dict[str, torch.Tensor]]:
        def spoiler(A: torch.Tensor, B: torch.Tensor) -> Any:  # noqa: N803 - the definition's names
            B.zero_()
            raise RuntimeError(f"{A.shape[0]} rows are too many")

        return spoiler if source == "spoiler" else lambda A, B: {"C": torch.nn.functional.linear(A, B)}  # noqa: N803

    table = tuple(SimpleNamespace(name=each, ops=("gemm",)) for each in ("spoiler", "sound"))
    prover = Prover(dataset, Sources((SimpleNamespace(SOURCES=table, adapter=adapter),)), "cpu")

    with pytest.raises(RuntimeError, match="too many"):
        prover.prove(case)
    prover.prove(replace(case, source="sound"))

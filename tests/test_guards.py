"""Faults planted into this data set's own references: each must end in the verdict that names it.

The fault is a change of the published text, proven against the torch source on a CPU, as `nox -s matrix` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from guards import Fault, demand_caught, prove, published

from refgrid.dataset.case import Case
from refgrid.proving.proof import Prover
from refgrid.records.record import Verdict
from refgrid.sources import Sources

PREFILL = ("gqa_paged_prefill_causal_h5_kv1_d128_ps64", "edge_b3_q257_n11_p16")
DECODE = ("gqa_paged_decode_h20_kv4_d128_ps64", "edge_b5_n17_p32")
NORM = ("rmsnorm_h4096", "edge_b13")
FUSED = ("fused_add_rmsnorm_h2048", "edge_b13")
GEMM = ("gemm_n128_k2048", "edge_m129")

PLUS_ONE = Fault("weight plus one", NORM, "* weight.float()", "* (weight.float() + 1)", "output is off")
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
    PLUS_ONE,
    Fault(
        "residual not added", FUSED, "x = hidden_states.float() + residual.float()", "x = residual.float()", "output is"
    ),
    Fault("residual not updated", FUSED, "x.to(residual.dtype)", "residual.clone()", "residual_out is off"),
    Fault("sum in bfloat16", GEMM, "(a @ b.float().T)", "(a.bfloat16() @ b.bfloat16().T)", "C is off"),
    Fault("b not transposed right", GEMM, "b.float().T", "b.float().flip(0).T", "C is off"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(fault: Fault) -> None:
    demand_caught(published(), fault, "torch")


@pytest.mark.parametrize("where", [PREFILL, DECODE, NORM, FUSED, GEMM], ids=lambda where: where[0])
def test_the_unchanged_reference_matches_there(where: tuple[str, str]) -> None:
    prove(published(), where, "torch")


def test_an_output_cut_short_is_an_error_of_shape() -> None:
    told = r"output\.shape = \[0, 4096\], but should be \[13, 4096\]"
    fault = Fault("cut short", NORM, "return y.to(", "return y[:0].to(", told, Verdict.ERROR)

    demand_caught(published(), fault, "torch")


@pytest.mark.parametrize(
    ("fault", "failure"),
    [
        pytest.param(replace(PLUS_ONE, sound="* bias"), "'[*] bias' is not in .*: the fault plants nothing", id="text"),
        pytest.param(replace(PLUS_ONE, broken=PLUS_ONE.sound), "DID NOT RAISE", id="nothing found"),
        pytest.param(replace(PLUS_ONE, told="lse is off"), "does not tell of 'lse is off'", id="reason"),
        pytest.param(replace(PLUS_ONE, verdict=Verdict.ERROR), "MISMATCH, but should be Verdict.ERROR", id="verdict"),
    ],
)
def test_a_guard_that_does_not_fire_as_told_fails(fault: Fault, failure: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception), match=failure):
        demand_caught(published(), fault, "torch")


def test_a_truth_that_fails_half_way_leaves_no_damaged_weight_to_others() -> None:
    name, workload = GEMM
    case = Case(name, "gemm", "gemm", workload, "numerics", "spoiler")

    def adapter(source: str, _op: str, _device: str) -> Callable[..., dict[str, torch.Tensor]]:
        def spoiler(A: torch.Tensor, B: torch.Tensor) -> Any:  # noqa: N803 - the definition's names
            B.zero_()
            raise RuntimeError(f"{A.shape[0]} rows are too many")

        return spoiler if source == "spoiler" else lambda A, B: {"C": torch.nn.functional.linear(A, B)}  # noqa: N803

    table = tuple(SimpleNamespace(name=each, ops=("gemm",)) for each in ("spoiler", "sound"))
    prover = Prover(published(), Sources((SimpleNamespace(SOURCES=table, adapter=adapter),)), "cpu")

    with pytest.raises(RuntimeError, match="too many"):
        prover.prove(case)
    prover.prove(replace(case, source="sound"))

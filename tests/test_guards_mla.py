"""Faults planted into the references of latent and ragged attention: each must be a mismatch of the right output."""

from __future__ import annotations

import pytest
from guards import Fault, demand_caught, prove, published, size

DECODE = ("mla_paged_decode_h16_ckv512_kpe64_ps1", "edge_b2_n129_p129")
PAGES = ("mla_paged_decode_h16_ckv512_kpe64_ps64", "edge_b5_n7_p7")
PREFILL = ("mla_paged_prefill_causal_h8_ckv512_kpe64_ps1", "edge_b3_q17_n257_p300")
CHUNK = ("mla_paged_prefill_causal_h16_ckv512_kpe64_ps64", "edge_b3_q13_n5_p8")
RAGGED = ("gqa_ragged_prefill_causal_h20_kv4_d128", "edge_b5_q17_n67")
WIDE = ("gqa_ragged_prefill_causal_h8_kv1_d256", "edge_b5_q17_n67")
EXPANDED = ("mla_ragged_prefill_causal_h8_qk192_vo128", "edge_b5_q17_n67")
PLACES = [DECODE, PAGES, PREFILL, CHUNK, RAGGED, WIDE, EXPANDED]

FAULTS = [
    Fault("rotary part left out", DECODE, "[q_nope, q_pe], [ckv, kpe]", "[q_nope], [ckv]", "output is off"),
    Fault("rotary part alone", DECODE, "[q_nope, q_pe], [ckv, kpe]", "[q_pe], [kpe]", "output is off"),
    Fault("scale of the absorbed width", DECODE, "sm_scale=sm_scale", "sm_scale=576**-0.5", "output is off"),
    Fault("scale off by 1 %", PREFILL, "sm_scale=sm_scale", "sm_scale=sm_scale * 1.01", "lse is off"),
    Fault(
        "one part not scaled",
        PREFILL,
        "* (sm_scale * math.log2(math.e)) for",
        "* (sm_scale * math.log2(math.e) if each is q[0] else 1) for",
        "output is off",
    ),
    Fault("value of the next key", DECODE, "values = keys[0]", "values = keys[0].roll(1, 2)", "output is off"),
    Fault("value turned", DECODE, "values = keys[0]", "values = keys[0].roll(1, 3)", "output is off"),
    Fault("pages in order", DECODE, "page = kv_indices[", "page = kv_indices.sort().values[", "output is"),
    Fault(
        "last page taken as full", PAGES, "* page_size + kv_last_page_len", "* page_size + page_size", "output is nan"
    ),
    Fault("last page left out", PAGES, "* page_size + kv_last_page_len", "* page_size", "output is off"),
    Fault("slots of a page reversed", PAGES, "+ j % page_size", "+ page_size - 1 - j % page_size", "output is"),
    Fault("causal mask one key too wide", CHUNK, "- length + i + 1", "- length + i + 2", "output is"),
    Fault("causal mask aligned top left", PREFILL, "kv_len[sequence, None] - length + i + 1", "i + 1", "output is"),
    Fault(
        "lse in base e", PREFILL, "lse = m + torch.log2(total)", "lse = (m + torch.log2(total)) * 0.6931", "lse is off"
    ),
    Fault("keys of the first sequence for all", RAGGED, "kv_indptr.long()[sequence]", "0 * sequence", "output is off"),
    Fault(
        "as many keys as queries",
        RAGGED,
        "paged_lengths(kv_indptr, None",
        "paged_lengths(qo_indptr, None",
        "output is off",
    ),
    Fault("causal mask one key too narrow", RAGGED, "- length + i + 1", "- length + i", "output is"),
    Fault("groups of heads mixed up", RAGGED, "return output[", "return output.roll(1, 1)[", "output is off"),
    Fault("keys in place of values", RAGGED, "if v is k[0] else", "if True else", "output is off"),
    Fault("kv heads swapped", RAGGED, "gather(v, slot)", "gather(v, slot).flip(1)", "output is off"),
    Fault("half of a wide head", WIDE, "a @ b.mT", "a[..., :128] @ b[..., :128].mT", "output is off"),
    Fault("keys cut to the width of values", EXPANDED, "a @ b.mT", "a[..., :128] @ b[..., :128].mT", "output is off"),
    Fault("lse without the maximum", EXPANDED, "lse = m + torch.log2(total)", "lse = torch.log2(total)", "lse is"),
    Fault("scale from the width of values", EXPANDED, "sm_scale=sm_scale", "sm_scale=128**-0.5", "output is off"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(fault: Fault) -> None:
    demand_caught(published(), fault)


@pytest.mark.parametrize("where", PLACES, ids=lambda where: where[0])
def test_the_unchanged_reference_matches_there_and_a_laptop_proves_it(where: tuple[str, str]) -> None:
    prove(published(), where)

    assert size(published(), where) == "small"

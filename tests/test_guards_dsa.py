"""Faults planted into the references of sparse attention and its indexer: each must be a mismatch of the output."""

from __future__ import annotations

import pytest
from guards import Fault, demand_caught, prove, published, size

SLOTS = ("dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps1", "edge_t5_p300")
PAGES = ("dsa_sparse_attention_h16_ckv512_kpe64_topk2048_ps64", "edge_t5_p5")
INDEX = ("dsa_topk_indexer_fp8_h64_d128_topk2048_ps64", "edge_b3_m33_p70")
SHORT = ("dsa_topk_indexer_fp8_h64_d128_topk2048_ps64", "edge_b5_m32_p31")
TIES = ("dsa_topk_indexer_fp8_h64_d128_topk2048_ps64", "edge_ties_b4_m48_p100")
PLACES = [SLOTS, PAGES, INDEX, SHORT, TIES]

FAULTS = [
    Fault("scale off by 1 %", SLOTS, "(sm_scale * ", "(sm_scale * 1.01 * ", "lse is off"),
    Fault("scale of the absorbed width", SLOTS, "(sm_scale * ", "(576**-0.5 * ", "output is off"),
    Fault("rotary part left out", SLOTS, "q_nope @ ckv.mT + q_pe @ kpe.mT", "q_nope @ ckv.mT", "output is off"),
    Fault("rotary part alone", SLOTS, "q_nope @ ckv.mT + q_pe @ kpe.mT", "q_pe @ kpe.mT", "output is off"),
    Fault("-1 read as slot 0", SLOTS, "chosen = index >= 0", "chosen = index >= -1", "output is"),
    Fault(
        "-1 ends the list",
        SLOTS,
        "sparse_indices.sort(",
        "sparse_indices.where((sparse_indices >= 0).cumprod(1).bool(), -1).sort(",
        "output is",
    ),
    Fault("slot 0 read as none", SLOTS, "chosen = index >= 0", "chosen = index > 0", "output is"),
    Fault("lse in base e", SLOTS, "(m + torch.log2(total))", "((m + torch.log2(total)) * 0.6931)", "lse is off"),
    Fault("lse without the maximum", SLOTS, "(m + torch.log2(total))", "torch.log2(total)", "lse is off"),
    Fault("value of another key", SLOTS, "p @ ckv / total", "p.roll(1, 2) @ ckv / total", "output is off"),
    Fault("token without keys divided by 0", SLOTS, "torch.where(some, p @ ckv / total, 0)", "p @ ckv / total", "nan"),
    Fault("first index dropped", SLOTS, "sparse_indices.sort(", "sparse_indices[:, 1:].sort(", "output is"),
    Fault("last key dropped", SLOTS, ": keys[first]].long()", ": keys[first] - 1].long()", "output is"),
    Fault("tokens with fewest keys first", SLOTS, "descending=True, stable=True", "stable=True", "output is"),
    Fault("order of tokens not undone", SLOTS, "output[part] = ", "output[first : first + fit] = ", "output is"),
    Fault(
        "choice of the first token",
        SLOTS,
        "sparse_indices.sort(",
        "sparse_indices[:1].expand(5, -1).sort(",
        "output is",
    ),
    Fault("slots of a page reversed", PAGES, "ckv_cache.flatten(0, 1)", "ckv_cache.flip(1).flatten(0, 1)", "output is"),
    Fault(
        "page and offset swapped", PAGES, "_cache.flatten(0, 1)", "_cache.transpose(0, 1).flatten(0, 1)", "output is"
    ),
    Fault("relu dropped", INDEX, "torch.relu(q[b] @ k.mT)", "q[b] @ k.mT", "topk_indices is"),
    Fault(
        "relu of the sum of heads",
        INDEX,
        "torch.relu(q[b] @ k.mT)",
        "torch.relu(q[b].sum(1, keepdim=True) @ k.mT).repeat(1, heads, 1)",
        "topk_indices is",
    ),
    Fault("weights dropped", INDEX, "(weights[b, None] @ s)", "s.sum(1, keepdim=True)", "topk_indices is"),
    Fault("weights of the next sequence", INDEX, "weights[b, None]", "weights[b - 1, None]", "topk_indices is"),
    Fault("weights without their sign", INDEX, "weights[b, None]", "weights[b, None].abs()", "topk_indices is"),
    Fault("scale left out", INDEX, "return values.float() * scales[:, :, None]", "return values.float()", "topk"),
    Fault(
        "scale of the next key",
        INDEX,
        "scales[:, :, None]",
        "scales.roll(1, 1)[:, :, None]",
        "topk_indices is",
    ),
    Fault(
        "scale behind each key",
        INDEX,
        "values = held[:, : page_size * d].view(torch.float8_e4m3fn).unflatten(1, (page_size, d))\n"
        "    scales = held[:, page_size * d :].view(torch.float32)",
        "each = held.unflatten(1, (page_size, d + 4))\n"
        "    values = each[..., :d].contiguous().view(torch.float8_e4m3fn)\n"
        "    scales = each[..., d:].contiguous().view(torch.float32)[..., 0]",
        "topk_indices",
    ),
    Fault(
        "scales before the values",
        INDEX,
        "held[:, page_size * d :].view(torch.float32)",
        "held[:, : page_size * 4].contiguous().view(torch.float32)",
        "topk_indices",
    ),
    Fault(
        "page and offset swapped, indices",
        INDEX,
        "page * page_size + best % page_size",
        "best % page_size * len(k_index_cache_fp8) + page",
        "topk_indices is",
    ),
    Fault("positions for slots", INDEX, "page * page_size + best % page_size", "best", "topk_indices is"),
    Fault(
        "one key too few", INDEX, "scores.topk(min(topk, ", "scores.topk(min(topk - 1, ", r"topk_indices is -1 at \[0, "
    ),
    Fault("worst in place of best", INDEX, "dim=1).indices", "dim=1, largest=False).indices", "topk_indices is -1"),
    Fault("first in place of best", INDEX, "best = scores.topk(", "best = (-position.expand_as(scores)).topk(", "topk"),
    Fault("a key beyond the last", INDEX, "(position >= seq_lens", "(position >= 1 + seq_lens", "topk_indices is"),
    Fault("the last key left out", SHORT, "best < seq_lens[:, None]", "best < seq_lens[:, None] - 1", "is -1 at "),
    Fault("0 for none", SHORT, "best % page_size, -1)", "best % page_size, 0)", "topk_indices is 0 at "),
    Fault("keys of the first sequence", INDEX, "block_table[b, i]", "block_table[0, i]", "topk_indices is"),
    Fault("relu dropped, ties", TIES, "torch.relu(q[b] @ k.mT)", "q[b] @ k.mT", "topk_indices lacks"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_a_mismatch_that_names_the_output(fault: Fault) -> None:
    demand_caught(published(), fault)


@pytest.mark.parametrize("where", PLACES, ids=lambda where: where[1])
def test_the_unchanged_reference_matches_there_and_a_laptop_proves_it(where: tuple[str, str]) -> None:
    prove(published(), where)

    assert size(published(), where) == "small"

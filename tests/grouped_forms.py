"""The other forms of grouped attention, on any device: bodies of the tests on the CPU and on a GPU.

Each must give the bits of grouped_flash_attn_func over slices that are written out here, or of the form with separate
tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from emulated_ranks import emulated
from grouped_checks import check_precision
from grouped_layouts import CAUSAL, Layout, Subject, run_both
from zigzag_checks import NAMES, Case, Tensors, drawn, run_emulated

from refgrid_solutions.grouped_attention import (
    grouped_flash_attn_varlen_func,
    varlen_groups,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
    zigzag_llama3_prepare,
    zigzag_shard,
)
from refgrid_solutions.grouped_attention.zigzag import Exchange

# Two sequences of 172 and 129 keys, of which an early group of 87 rows sees 86 and 65, and a late one of 107 all.
ROWS = [[0, 43, 87], [0, 64, 107]]
KEYS = [[0, 86, 151], [0, 172, 301]]
LAYOUT = Layout(
    [
        (0, 43, 0, 86, CAUSAL),
        (43, 87, 172, 237, CAUSAL),
        (87, 151, 0, 172, CAUSAL),
        (151, 194, 172, 301, CAUSAL),
    ],
    194,
    301,
)
_GROUPS = (87, 107)


def check_list_form(subject: Subject) -> None:
    """Lists of groups in, lists of groups out, and one gradient for each group's q."""
    expected = run_both(LAYOUT, subject, deterministic=True)
    q_list, douts = ([part.clone() for part in each.split(_GROUPS)] for each in (expected.q, expected.dout))
    leaves = [tensor.detach().requires_grad_() for tensor in (*q_list, expected.k, expected.v)]
    *q_list, k, v = leaves
    outs, lses = grouped_flash_attn_varlen_func(
        q_list, k, v, ROWS, KEYS, causal=True, deterministic=True, backend=subject.backend
    )
    *dqs, dk, dv = torch.autograd.grad(outs, leaves, douts)

    found = torch.cat(outs), torch.cat(lses, 1), torch.cat(dqs), dk, dv
    _hold_bits(found, (expected.out, expected.lse, expected.dq, expected.dk, expected.dv))


def check_varlen_groups(subject: Subject) -> None:
    """Offsets that lie on the device become the slices, and those are planned as any."""
    told = ([torch.tensor(each, device=subject.device) for each in offsets] for offsets in (ROWS, KEYS))
    rows, keys = varlen_groups(*told, total_k=LAYOUT.total_k)
    entries = [(*one, *other, CAUSAL) for one, other in zip(rows, keys, strict=True)]

    assert entries == LAYOUT.entries
    check_precision(LAYOUT._replace(entries=entries), subject)


def check_packed(subject: Subject) -> None:
    """Of two ranks: k and v in one tensor, and q too, each with one gradient."""
    case = Case(
        *([172, 300], 1, (2, 2), subject.head_dim, subject.dtype, subject.device),
        backend=subject.backend,
        deterministic=True,
    )
    told = drawn(case)
    apart = run_emulated(case, told, 2)
    kv = emulated(2, lambda rank: _packed(case, told, rank, _q_and_kv, zigzag_llama3_flash_attn_varlen_kvpacked_func))
    qkv = emulated(2, lambda rank: _packed(case, told, rank, _qkv, zigzag_llama3_flash_attn_varlen_qkvpacked_func))

    for parts, of_kv, of_qkv in zip(apart, kv, qkv, strict=True):
        _hold_bits((*of_kv[:3], *of_kv[3].unbind(1)), parts)
        _hold_bits((*of_qkv[:2], *of_qkv[2].unbind(1)), parts)


def _packed(case: Case, told: Tensors, exchange: Exchange, merge: Callable[..., Tensors], call: Any) -> Tensors:
    """out, lse and the gradients of the merged tensors of one rank."""
    own = [zigzag_shard(tensor, case.cu_seqlens, exchange.rank, 2) for tensor in told]
    leaves = [tensor.requires_grad_() for tensor in merge(*own[:3])]
    out, lse, _ = call(
        *leaves,
        *zigzag_llama3_prepare(case.cu_seqlens, exchange.rank, 2)[:4],
        case.stride,
        causal=True,
        deterministic=True,
        return_attn_probs=True,
        group=exchange,
        backend=case.backend,
    )
    return out.detach(), lse, *torch.autograd.grad(out, leaves, own[3])


def _q_and_kv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    return q, torch.stack((k, v), 1)


def _qkv(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Tensors:
    return (torch.stack((q, k, v), 1),)


def _hold_bits(found: Tensors, expected: Tensors) -> None:
    for name, one, other in zip(NAMES, found, expected, strict=True):
        assert torch.equal(one, other), f"{name} has other bits"


FORMS: dict[str, Callable[[Subject], None]] = {
    "list form": check_list_form,
    "varlen groups": check_varlen_groups,
    "packed": check_packed,
}

"""Grouped-query attention in float64, sequence by sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refgrid_groundtruth.oracle import attention

if TYPE_CHECKING:
    import torch


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """q [total_q, num_qo_heads, head_dim]; k, v [total_kv, num_kv_heads, head_dim]; qo_indptr, kv_indptr [len_indptr].

    -> output as q; lse [total_q, num_qo_heads] float32, base 2.
    """
    return attention.ragged(q, k, v, qo_indptr, kv_indptr, sm_scale)

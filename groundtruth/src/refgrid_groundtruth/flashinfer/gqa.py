"""Attention by FlashInfer's wrappers: paged decode on CUDA cores or tensor cores, prefill on fa2 or fa3.

Since 0.7 decode's plan takes what follows the leading arguments by keyword only.
"""

from __future__ import annotations

import functools
import math

import flashinfer.decode
import flashinfer.prefill
import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.paged import kv_lengths, sees_no_key

# Room for the partial results of split sequences; 128 MiB is recommended, long batches of many heads need more.
WORKSPACE_BYTES = 512 * 2**20

# Up to 0.6 the kernels' minus infinity is -5e4, and a row without keys gets that plus the log2 of what was masked.
NO_KEY_BELOW = -4.9e4


def gqa_paged_decode(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
    use_tensor_cores: bool = False,
) -> dict[str, torch.Tensor]:
    """flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper: the CUDA-core kernel, or the fa2 prefill kernel.

    q [batch_size, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; kv_indptr
    [batch_size + 1], kv_indices [num_kv_indices], kv_last_page_len [batch_size], all int32
    -> output as q; lse [batch_size, num_qo_heads] float32, base 2. The CUDA-core kernel exists for groups of 1, 2, 3, 4
    and 8 query heads a key head (since 0.7 also 6 and 16), others it calls unsupported. The backend is named because
    "auto" takes fa3 on Hopper.
    """
    wrapper = flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper(
        workspace(q.device), "NHD", use_tensor_cores=use_tensor_cores, backend="fa2"
    )
    page_size = k_cache.shape[1]
    wrapper.plan(
        kv_indptr,
        kv_indices,
        _last_page_len(kv_indptr, kv_last_page_len, page_size),
        *(q.shape[1], k_cache.shape[2], q.shape[2], page_size),
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
        sm_scale=sm_scale,
    )
    output, lse = wrapper.run(q, (k_cache, v_cache), return_lse=True)
    no_key = kv_lengths(kv_indptr, kv_last_page_len, page_size) == 0
    return {"output": output, "lse": with_infinity(lse, no_key)}


def gqa_paged_prefill_causal(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_last_page_len: torch.Tensor | None = None,
    *,
    sm_scale: float,
    backend: str = "fa2",
) -> dict[str, torch.Tensor]:
    """flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper, causal (right-aligned), on its fa2 or fa3 backend.

    q [total_q, num_qo_heads, head_dim]; k_cache, v_cache [num_pages, page_size, num_kv_heads, head_dim]; qo_indptr,
    kv_indptr [len_indptr], kv_indices [num_kv_indices], kv_last_page_len [len_indptr - 1], all int32
    -> output as q; lse [total_q, num_qo_heads] float32, base 2. Raises Unavailable("unsupported") for fa3 and a
    sequence of more queries than keys: up to 0.6.12 its rows without keys average what the mask hides.
    """
    page_size = k_cache.shape[1]
    kv_len = kv_lengths(kv_indptr, kv_last_page_len, page_size)
    if backend == "fa3":
        _demand_keys(qo_indptr, kv_len)
    wrapper = flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper(workspace(q.device), "NHD", backend=backend)
    wrapper.plan(
        qo_indptr,
        kv_indptr,
        kv_indices,
        _last_page_len(kv_indptr, kv_last_page_len, page_size),
        *(q.shape[1], k_cache.shape[2], q.shape[2], page_size),
        causal=True,
        sm_scale=sm_scale,
        q_data_type=q.dtype,
        kv_data_type=k_cache.dtype,
    )
    output, lse = wrapper.run(q, (k_cache, v_cache), return_lse=True)
    return {"output": output, "lse": with_infinity(lse, sees_no_key(qo_indptr, kv_len))}


def gqa_ragged_prefill_causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    *,
    sm_scale: float,
    backend: str = "fa2",
) -> dict[str, torch.Tensor]:
    """flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper, causal (right-aligned), on its fa2 or fa3 backend.

    q [total_q, num_qo_heads, d_qk]; k [total_kv, num_kv_heads, d_qk]; v [total_kv, num_kv_heads, d_vo]; qo_indptr,
    kv_indptr [len_indptr] int32 -> output [total_q, num_qo_heads, d_vo]; lse [total_q, num_qo_heads] float32, base 2.
    Raises Unavailable("unsupported") for fa3 as gqa_paged_prefill_causal.
    """
    kv_len = kv_indptr.diff().long()
    if backend == "fa3":
        _demand_keys(qo_indptr, kv_len)
    wrapper = flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace(q.device), "NHD", backend=backend)
    wrapper.plan(
        qo_indptr,
        kv_indptr,
        *(q.shape[1], k.shape[1], q.shape[2]),
        head_dim_vo=v.shape[2],
        causal=True,
        sm_scale=sm_scale,
        q_data_type=q.dtype,
        kv_data_type=k.dtype,
    )
    output, lse = wrapper.run(q, k, v, return_lse=True)
    return {"output": output, "lse": with_infinity(lse, sees_no_key(qo_indptr, kv_len))}


@functools.cache
def workspace(device: torch.device) -> torch.Tensor:
    """One a device: the kernels need it zeroed before its first use only."""
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _last_page_len(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor | None, page_size: int) -> torch.Tensor:
    """FlashInfer wants it for every page size, and 0 for an empty sequence: its plan adds it to the length."""
    last = torch.full_like(kv_indptr[1:], page_size) if kv_last_page_len is None else kv_last_page_len
    return torch.where(kv_indptr.diff() > 0, last, 0).int()


def with_infinity(lse: torch.Tensor, no_key: torch.Tensor) -> torch.Tensor:
    """The library's finite stand-in for minus infinity, in rows that see no key and nowhere else."""
    return torch.where(no_key[:, None] & (lse < NO_KEY_BELOW), -math.inf, lse)


def _demand_keys(qo_indptr: torch.Tensor, kv_len: torch.Tensor) -> None:
    lengths = zip(qo_indptr.diff().tolist(), kv_len.tolist(), strict=True)
    for sequence, (queries, keys) in enumerate(lengths):
        if queries > keys > 0:
            reason = f"sequence {sequence} has {queries} queries but {keys} keys: fa3 defines nothing"
            raise Unavailable("unsupported", f"{reason} for a row that sees no key")

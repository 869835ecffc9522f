"""Samples by flashinfer.sampling, whose kernels reject draws until one is within the filter, without a sort.

Tokens that tie with the last one kept are kept. Its samples are int32; torch's default generator gives the seed.
"""

from __future__ import annotations

import flashinfer.sampling
import torch

from refgrid_groundtruth import Unavailable


def top_k_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size] float32, top_k [batch_size] int32 -> samples [batch_size] int64."""
    samples = flashinfer.sampling.top_k_sampling_from_probs(probs, _all_if_none(probs, top_k), deterministic=True)
    return {"samples": samples.long()}


def top_p_sampling_from_probs(probs: torch.Tensor, top_p: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size] float32, top_p [batch_size] float32 -> samples [batch_size] int64.

    Raises Unavailable("unsupported") for a top_p of 0 or less, with which the kernel rejects every token.
    """
    _demand_positive(top_p)
    return {"samples": flashinfer.sampling.top_p_sampling_from_probs(probs, top_p, deterministic=True).long()}


def top_k_top_p_sampling_from_probs(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size] float32; top_k int32, top_p float32 [batch_size] -> samples [batch_size] int64.

    Raises Unavailable("unsupported") as top_p_sampling_from_probs.
    """
    _demand_positive(top_p)
    samples = flashinfer.sampling.top_k_top_p_sampling_from_probs(
        probs, _all_if_none(probs, top_k), top_p, filter_apply_order="top_k_first", deterministic=True
    )
    return {"samples": samples.long()}


def _all_if_none(probs: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The kernels' word for no filter is vocab_size; with 0 they reject every token."""
    return torch.where(top_k > 0, top_k, probs.shape[1])


def _demand_positive(top_p: torch.Tensor) -> None:
    if not (top_p > 0).all():
        raise Unavailable("unsupported", f"a top_p of {top_p.min().item():g} rejects every token")

"""Samples by SGLang's own sampler in PyTorch, which sorts: a kernel of neither SGLang nor FlashInfer.

It measures the nucleus by the mass before top-k, so it is no truth for both filters at once; there SGLang's server
calls FlashInfer.
"""

from __future__ import annotations

import torch
from sglang.srt.layers import sampler

from refgrid_groundtruth import Unavailable


def top_k_sampling_from_probs(probs: torch.Tensor, top_k: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size] float32, top_k [batch_size] int32 -> samples [batch_size] int64.

    Raises Unavailable("unsupported") for a row that is cut through tied tokens, of which the sort keeps some.
    """
    top_k = torch.where(top_k > 0, top_k, probs.shape[1])  # the sampler's word for no filter
    _demand_no_tie(probs, torch.arange(probs.shape[1], device=probs.device) < top_k[:, None])
    return _samples(probs, top_k, torch.ones_like(probs[:, 0]))


def top_p_sampling_from_probs(probs: torch.Tensor, top_p: torch.Tensor) -> dict[str, torch.Tensor]:
    """probs [batch_size, vocab_size] float32, top_p [batch_size] float32 -> samples [batch_size] int64.

    Raises Unavailable("unsupported") for a row that is cut through tied tokens, of which the sort keeps some, and for
    a top_p below 0, which leaves no token.
    """
    if (top_p < 0).any():
        raise Unavailable("unsupported", f"a top_p of {top_p.min().item():g} leaves no token")
    falling = probs.sort(dim=1, descending=True).values
    _demand_no_tie(probs, falling.cumsum(dim=1, dtype=torch.float64) - falling <= top_p[:, None])
    return _samples(probs, torch.full_like(top_p, probs.shape[1], dtype=torch.int32), top_p)


def _samples(probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> dict[str, torch.Tensor]:
    samples = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
        probs,
        top_k,
        top_p,
        torch.zeros_like(top_p),
        need_min_p_sampling=False,
        sampling_seed=None,
        positions=None,
    )
    return {"samples": samples.long()}


def _demand_no_tie(probs: torch.Tensor, kept: torch.Tensor) -> None:
    """kept [batch_size, vocab_size]: which places of the falling order stay, the first ones of each row."""
    falling = probs.sort(dim=1, descending=True).values
    cut = kept[:, :-1] & ~kept[:, 1:]
    tied = (cut & (falling[:, :-1] == falling[:, 1:]) & (falling[:, 1:] > 0)).any(dim=1)
    if tied.any():
        row = int(tied.nonzero()[0])
        raise Unavailable("unsupported", f"row {row} is cut through tied tokens, of which the sampler keeps some")

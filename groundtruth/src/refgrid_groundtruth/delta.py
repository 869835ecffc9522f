"""What the gated delta rule's inputs say, for adapters whose library wants gates or sequences in another form."""

from __future__ import annotations

import torch

from refgrid_groundtruth import Unavailable


def gates(
    A_log: torch.Tensor,  # noqa: N803 - the definition's name
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gates that A_log, a, dt_bias and b stand for: log g (at most 0) and beta.

    A_log, dt_bias [num_v_heads]; a, b [..., num_v_heads] -> both as a, in float32, which every library takes.
    """
    log_g = -A_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias)
    return log_g, b.float().sigmoid()


def with_tokens(cu_seqlens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which sequences have tokens, and where those start: rows [n] int64, [n + 1] as cu_seqlens.

    No library is called with a sequence of none: a serving engine's batch has no such, and their chunks begin at 1.
    Raises Unavailable("unsupported") when no sequence has a token.
    """
    rows = cu_seqlens.diff().nonzero()[:, 0]
    if not len(rows):
        raise Unavailable("unsupported", "no sequence has a token, so there is nothing to call the library with")
    return rows, torch.cat([cu_seqlens[rows], cu_seqlens[-1:]])


def demand_no_padding(initial_state_indices: torch.Tensor) -> None:
    """Raises Unavailable("unsupported") for a negative index."""
    negative = int((initial_state_indices < 0).sum())
    if negative:
        raise Unavailable("unsupported", f"{negative} of {len(initial_state_indices)} sequences are padding")

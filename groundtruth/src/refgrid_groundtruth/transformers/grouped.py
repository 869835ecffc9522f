"""Grouped attention by llama's eager_attention_forward, slice by slice; as precise as in `gqa`.

Run with transformers 5.23.0. Queries in no slice are not handed over: nothing attends for them.
"""

from __future__ import annotations

import torch

from refgrid_groundtruth import Unavailable
from refgrid_groundtruth.grouped import blind_rows, slices
from refgrid_groundtruth.paged import tiles_of
from refgrid_groundtruth.transformers.gqa import Layer, eager_attention


def gqa_grouped(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_ranges: torch.Tensor,
    k_ranges: torch.Tensor,
    mask_types: torch.Tensor,
    *,
    sm_scale: float,
) -> dict[str, torch.Tensor]:
    """q [total_q, num_qo_heads, head_dim]; k, v [total_k, num_kv_heads, head_dim]; ranges [num_slices, 2].

    mask_types [num_slices] -> output as q; eager attention gives no lse. Raises Unavailable("unsupported") where a
    query of a slice sees no key, for which a softmax over nothing defines no result.
    """
    pieces = slices(q_ranges, k_ranges, mask_types)
    for number, piece in enumerate(pieces):
        if blind_rows(piece):
            start, end, first, last, _ = piece
            reason = (
                f"slice {number} has {end - start} queries and {last - first} keys: eager attention defines nothing"
            )
            raise Unavailable("unsupported", f"{reason} for a row that sees no key")
    layer, output = Layer(q.shape[1] // k.shape[1]), torch.zeros_like(q)
    for tile in tiles_of(q, k, v, pieces):
        output[tile.rows] = eager_attention(layer, tile, sm_scale)
    return {"output": output}

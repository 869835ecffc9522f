"""Context parallelism: sequences dealt out over ranks in zigzag, keys gathered a few heads at a time."""

from refgrid_solutions.grouped_attention.zigzag.exchange import Exchange
from refgrid_solutions.grouped_attention.zigzag.interface import (
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
)
from refgrid_solutions.grouped_attention.zigzag.sharding import (
    ZigzagPrepared,
    zigzag_llama3_prepare,
    zigzag_shard,
    zigzag_unshard,
)

__all__ = [
    "Exchange",
    "ZigzagPrepared",
    "zigzag_llama3_flash_attn_varlen_func",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func",
    "zigzag_llama3_prepare",
    "zigzag_shard",
    "zigzag_unshard",
]

"""Grouped flash attention: many slices of rows, each with its own range of shared keys, in one exact call."""

from refgrid_solutions.grouped_attention.interface import grouped_flash_attn_func
from refgrid_solutions.grouped_attention.plan import GroupedAttnPlan, plan_grouped_attn
from refgrid_solutions.grouped_attention.ranges import CAUSAL, FULL
from refgrid_solutions.grouped_attention.varlen import grouped_flash_attn_varlen_func, varlen_groups
from refgrid_solutions.grouped_attention.zigzag import (
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
    zigzag_llama3_prepare,
    zigzag_shard,
    zigzag_unshard,
)

__all__ = [
    "CAUSAL",
    "FULL",
    "GroupedAttnPlan",
    "grouped_flash_attn_func",
    "grouped_flash_attn_varlen_func",
    "plan_grouped_attn",
    "varlen_groups",
    "zigzag_llama3_flash_attn_varlen_func",
    "zigzag_llama3_flash_attn_varlen_kvpacked_func",
    "zigzag_llama3_flash_attn_varlen_qkvpacked_func",
    "zigzag_llama3_prepare",
    "zigzag_shard",
    "zigzag_unshard",
]

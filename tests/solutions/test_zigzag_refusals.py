"""What zigzag attention refuses, by name and before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from refgrid_solutions.grouped_attention import (
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_kvpacked_func,
    zigzag_llama3_flash_attn_varlen_qkvpacked_func,
)
from refgrid_solutions.grouped_attention.zigzag import Exchange


class Nobody(Exchange):
    """Ranks that must not be asked for anything."""

    @property
    def rank(self) -> int:
        return 1

    @property
    def world_size(self) -> int:
        return 2

    def gather(self, whole: torch.Tensor, part: torch.Tensor) -> Any:
        raise AssertionError(f"{part.shape} was sent to fill {whole.shape} before all was checked")

    def reduce_scatter(self, part: torch.Tensor, whole: torch.Tensor) -> Any:
        raise AssertionError(f"{whole.shape} was sent to fill {part.shape} before all was checked")


def call(**changes: Any) -> Any:
    """Of rank 1 of 2, sequences of 8 and 16 tokens."""
    told: dict[str, Any] = {
        "q": torch.zeros(12, 4, 8),
        "k": torch.zeros(12, 2, 8),
        "v": torch.zeros(12, 2, 8),
        "cu_seqlens_q": [0, 4, 12],
        "cu_seqlens_k": [0, 8, 24],
        "max_seqlen_q": 8,
        "max_seqlen_k": 16,
        "heads_k_stride": 1,
        "local_k_slice": slice(0, 24),
        "group": Nobody(),
        **changes,
    }
    return zigzag_llama3_flash_attn_varlen_func(**told)


def test_a_legal_call_is_sent() -> None:
    with pytest.raises(AssertionError, match=r"torch.Size.* was sent to fill torch.Size.* before all was checked"):
        call()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"cu_seqlens_k": [0, 8, 22]},
            "cu_seqlens_k[2] - cu_seqlens_k[1] = 14, but should be a multiple of 2 * world_size = 4, such as 12 or 16",
        ),
        ({"cu_seqlens_k": torch.tensor([0, 8, 4])}, "cu_seqlens_k[2] = 4, but should be at least cu_seqlens_k[1] = 8"),
        (
            {"cu_seqlens_q": [0, 8, 24]},
            "cu_seqlens_q[1] = 8, but should be 4: cu_seqlens_k[1] = 8, of all ranks together, divided by world_size",
        ),
        ({"cu_seqlens_q": [0, 12]}, "cu_seqlens_q tells of 1 sequences, but should of 2, as cu_seqlens_k does"),
        ({"max_seqlen_q": 7}, "max_seqlen_q = 7, but should be at least 8, the longest sequence"),
        ({"max_seqlen_k": 12}, "max_seqlen_k = 12, but should be at least 16, the longest sequence"),
        (
            {"q": torch.zeros(24, 4, 8)},
            "q.shape = (24, 4, 8), but should be (12, heads, head_dim): cu_seqlens_q[-1] rows",
        ),
        ({"q": torch.zeros(12, 32)}, "q.shape = (12, 32), but should be (12, heads, head_dim)"),
        ({"k": torch.zeros(11, 2, 8)}, "k.shape = (11, 2, 8), but should be (12, heads, 8)"),
        ({"k": torch.zeros(12, 2, 16)}, "k.shape = (12, 2, 16), but should be (12, heads, 8)"),
        ({"v": torch.zeros(12, 1, 8)}, "v.shape = (12, 1, 8), but should be (12, 2, 8)"),
        (
            {"k": torch.zeros(12, 3, 8), "v": torch.zeros(12, 3, 8)},
            "num_heads_k = 3 does not divide num_heads_q = 4",
        ),
        ({"v": torch.zeros(12, 2, 8).half()}, "v.dtype = torch.float16, but should be torch.float32, as of q"),
        ({"k": torch.zeros(12, 2, 8, device="meta")}, "k.device = meta, but should be cpu, as of q"),
        ({"heads_k_stride": 3}, "heads_k_stride = 3, but should divide the 2 heads of k: one of 1, 2"),
        ({"heads_k_stride": 0}, "heads_k_stride = 0, but should be an integer from 1"),
        ({"cu_seqlens_k": 24}, "cu_seqlens_k = 24, but should be a sequence, or a tensor of one dimension or more"),
        ({"softmax_scale": float("inf")}, "softmax_scale = inf, but should be a finite number, or None"),
        ({"softmax_scale": "0.1"}, "softmax_scale = '0.1', but should be a finite number, or None"),
        ({"deterministic": "yes"}, "deterministic = 'yes', but should be True or False"),
        ({"causal": None}, "causal = None, but should be True or False"),
        ({"return_attn_probs": "no"}, "return_attn_probs = 'no', but should be True or False"),
        ({"use_grouped_attention": 2}, "use_grouped_attention = 2, but should be True or False"),
        ({"backend": "fa9"}, "backend = 'fa9', but should be auto or one of"),
        ({"backend": "torch"}, "backend = 'torch' cannot run this plan: device = cpu, but should be on cuda"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_sent(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call(**changes)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dropout_p", 0.1),
        ("window_size", (128, 0)),
        ("window_size", None),
        ("alibi_slopes", torch.ones(4)),
        ("n_chunks", 4),
    ],
)
def test_what_is_not_written_is_named(argument: str, value: Any) -> None:
    with pytest.raises(NotImplementedError, match=rf"^{argument} = "):
        call(**{argument: value})


def test_packed_tensors_of_another_shape_are_named() -> None:
    told = [0, 4, 12], [0, 8, 24], 8, 16, 1
    kv, qkv = torch.zeros(12, 2, 8), torch.zeros(12, 2, 4, 8)
    with pytest.raises(ValueError, match=re.escape("kv.shape = (12, 2, 8), but should be (rows, 2, heads, head_dim)")):
        zigzag_llama3_flash_attn_varlen_kvpacked_func(torch.zeros(12, 4, 8), kv, *told)
    with pytest.raises(ValueError, match=re.escape("(12, 2, 4, 8), but should be (rows, 3, heads, head_dim)")):
        zigzag_llama3_flash_attn_varlen_qkvpacked_func(qkv, *told)

"""The list form: what each group's own call gives, keys of several sequences where they lie, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from naive_grouped import attend, dense_mask

from refgrid_solutions.grouped_attention import grouped_flash_attn_varlen_func, varlen_groups

# Two sequences of 8 and 6 keys; the early group sees 4 and 3 of them, the late one all.
EARLY, LATE = ([0, 2, 4], [0, 4, 7]), ([0, 3, 5], [0, 8, 14])
ROWS, KEYS = [EARLY[0], LATE[0]], [EARLY[1], LATE[1]]


def tensors(requires_grad: bool = False) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    q_list = [torch.randn(rows, 4, 8, dtype=torch.float64, requires_grad=requires_grad) for rows in (4, 5)]
    k, v = (torch.randn(14, 2, 8, dtype=torch.float64, requires_grad=requires_grad) for _ in range(2))
    return q_list, k, v


def test_keys_of_the_second_sequence_begin_where_they_lie_in_the_shared_keys() -> None:
    rows, keys = varlen_groups(ROWS, KEYS, total_k=14)

    assert rows == [(0, 2), (2, 4), (4, 7), (7, 9)]
    assert keys == [(0, 4), (8, 11), (0, 8), (8, 14)]


def test_told_offsets_win() -> None:
    _, keys = varlen_groups(ROWS, KEYS, torch.tensor([10, 0]))

    assert keys == [(10, 14), (0, 3), (10, 18), (0, 6)]


def test_one_sequence_begins_at_the_first_key_whatever_is_seen_of_it() -> None:
    assert varlen_groups([[0, 2], [0, 3]], [[0, 4], [0, 5]]) == ([(0, 2), (2, 5)], [(0, 4), (0, 5)])


@pytest.mark.parametrize("causal", [False, True])
def test_each_group_gets_what_its_own_call_gives(causal: bool) -> None:
    q_list, k, v = tensors(requires_grad=True)
    douts = [torch.randn_like(q) for q in q_list]

    outs, lses = grouped_flash_attn_varlen_func(q_list, k, v, ROWS, KEYS, causal=causal)
    found = torch.autograd.grad(outs, [*q_list, k, v], douts)

    expected_outs = []
    for q, out, lse, (rows, keys) in zip(q_list, outs, lses, (EARLY, LATE), strict=True):
        entries = [(rows[s], rows[s + 1], 8 * s, 8 * s + keys[s + 1] - keys[s], int(causal)) for s in range(2)]
        expected, expected_lse = attend(q, k, v, dense_mask(entries, len(q), 14), 8**-0.5)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(lse, expected_lse)
        expected_outs.append(expected)
    for one, other in zip(found, torch.autograd.grad(expected_outs, [*q_list, k, v], douts), strict=True):
        torch.testing.assert_close(one, other)


def test_one_group_is_not_copied_and_tensors_of_offsets_will_do() -> None:
    q_list, k, v = tensors()

    outs, lses = grouped_flash_attn_varlen_func(
        q_list[1:], k, v, [torch.tensor(LATE[0])], [torch.tensor(LATE[1], dtype=torch.int32)], max_seqlen_q_list=[3]
    )

    assert [out.shape for out in outs] == [(5, 4, 8)]
    assert [lse.shape for lse in lses] == [(4, 5)]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("dropout_p", 0.1),
        ("window_size", (128, 0)),
        ("window_size", (-1, 0)),
        ("window_size", 128),
        ("window_size", None),
        ("softcap", 30.0),
        ("alibi_slopes", torch.ones(4)),
    ],
)
def test_what_is_not_written_is_named(argument: str, value: Any) -> None:
    q_list, k, v = tensors()

    with pytest.raises(NotImplementedError, match=rf"^{argument} = "):
        grouped_flash_attn_varlen_func(q_list, k, v, ROWS, KEYS, **{argument: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"cu_seqlens_k_list": [[0, 4, 7], [0, 7, 13]]},
            "k_offsets = None: the longest that groups see of the 2 sequences are [7, 6] keys, 13 together, but "
            "total_k = 14: k_offsets should say where each sequence begins in k",
        ),
        ({"k_offsets": [0]}, "k_offsets = [0] has 1 entries, but should have one a sequence: 2"),
        ({"k_offsets": [0, 8.5]}, "k_offsets = [0, 8.5], but should be integers"),
        ({"cu_seqlens_q_list": [[0, 2.0, 4], LATE[0]]}, "cu_seqlens_q_list[0] = [0, 2.0, 4], but should be integers"),
        ({"k_offsets": [0, 9]}, "k_ranges[3] = (9, 15) is out of bounds"),
        ({"cu_seqlens_q_list": [[1, 2, 4], LATE[0]]}, "cu_seqlens_q_list[0] = [1, 2, 4], but should begin with 0"),
        (
            {"cu_seqlens_k_list": [EARLY[1], [0, 8, 6]]},
            "cu_seqlens_k_list[1] = [0, 8, 6], but should begin with 0 and never",
        ),
        ({"cu_seqlens_k_list": [EARLY[1], [0, 8]]}, "cu_seqlens_k_list[1] tells of 1 sequences, but should of 2"),
        (
            {"cu_seqlens_k_list": [EARLY[1]]},
            "cu_seqlens_q_list has 2 groups and cu_seqlens_k_list 1, but should be equal",
        ),
        ({"cu_seqlens_q_list": [EARLY[0], [0, 3, 6]]}, "q_list[1] has 5 rows, but cu_seqlens_q_list[1] ends at 6"),
        ({"max_seqlen_k_list": [4, 7]}, "max_seqlen_k_list[1] = 7, but should be at least 8, the longest sequence"),
        ({"max_seqlen_q_list": [4]}, "max_seqlen_q_list has 1 entries, but should have one a group: 2"),
        ({"max_seqlen_q_list": 4}, "max_seqlen_q_list = 4, but should be a sequence, or a tensor"),
        ({"max_seqlen_q_list": [None, 4]}, "max_seqlen_q_list[0] = None, but should be an integer from 0"),
        ({"cu_seqlens_q_list": None}, "cu_seqlens_q_list = None, but should be a sequence, or a tensor"),
        ({"cu_seqlens_k_list": [EARLY[1], 8]}, "cu_seqlens_k_list[1] = 8, but should be a sequence, or a tensor"),
        ({"k_offsets": 3}, "k_offsets = 3, but should be a sequence, or a tensor of one dimension or more"),
        ({"k_offsets": torch.tensor(3)}, "k_offsets = 3, but should be a sequence"),
        ({"deterministic": None}, "deterministic = None, but should be True or False"),
        ({"causal": "no"}, "causal = 'no', but should be True or False"),
        (
            {"softmax_scale": torch.nan},
            "softmax_scale = nan, but should be a finite number, or None for head_dim ** -0.5",
        ),
    ],
)
def test_offsets_that_do_not_fit_are_named(changes: dict[str, Any], words: str) -> None:
    q_list, k, v = tensors()
    told = {"cu_seqlens_q_list": ROWS, "cu_seqlens_k_list": KEYS, **changes}

    with pytest.raises(ValueError, match=re.escape(words)):
        grouped_flash_attn_varlen_func(q_list, k, v, **told)


Q, K = torch.zeros(4, 4, 8), torch.zeros(14, 2, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_list": [Q, Q[:, :2]]}, "q_list[1].shape = (4, 2, 8), but should be (rows, 4, 8), as q_list[0] has them"),
        ({"q_list": [Q, Q[..., :4]]}, "q_list[1].shape = (4, 4, 4), but should be (rows, 4, 8), as q_list[0] has them"),
        ({"q_list": [Q[0], Q]}, "q_list[0].shape = (4, 8), but should be (rows, heads, head_dim)"),
        ({"q_list": [Q, Q.half()]}, "q_list[1].dtype = torch.float16, but should be torch.float32, as of q_list[0]"),
        ({"q_list": Q}, "q_list is a Tensor, but should be a list of tensors, one a group"),
        ({"q_list": None}, "q_list is a NoneType, but should be a list of tensors, one a group"),
        ({"k": K[0, 0]}, "k.shape = (8,), but should be (rows, heads, 8), as q_list[0] has it"),
        ({"k": K[0]}, "k.shape = (2, 8), but should be (rows, heads, 8), as q_list[0] has it"),
        ({"k": K[..., :4]}, "k.shape = (14, 2, 4), but should be (rows, heads, 8), as q_list[0] has it"),
        ({"k": K.half()}, "k.dtype = torch.float16, but should be torch.float32, as of q_list[0]"),
        ({"v": K[:, :1]}, "v.shape = (14, 1, 8), but should be (14, 2, 8), as of k"),
        ({"v": K.to("meta")}, "v.device = meta, but should be cpu, as of q_list[0]"),
        ({"k": K[:, :1].expand(14, 3, 8), "v": K[:, :1].expand(14, 3, 8)}, "num_heads_k = 3 does not divide"),
        ({"cu_seqlens_k_list": [EARLY[1], [0, 8, 15]], "k_offsets": [0, 8]}, "k_ranges[3] = (8, 15) is out of bounds"),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_any_is_copied(
    changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"q_list": [Q, Q], "k": K, "v": K, "cu_seqlens_q_list": [EARLY[0]] * 2, "cu_seqlens_k_list": KEYS}
    grouped_flash_attn_varlen_func(**told)
    monkeypatch.setattr(torch, "cat", lambda *_: pytest.fail("q was copied before all was checked"))

    with pytest.raises(ValueError, match=re.escape(words)):
        grouped_flash_attn_varlen_func(**{**told, **changes})


def test_a_missing_group_is_named() -> None:
    q_list, k, v = tensors()

    with pytest.raises(ValueError, match="q_list has 1 groups, but cu_seqlens_q_list has 2"):
        grouped_flash_attn_varlen_func(q_list[:1], k, v, ROWS, KEYS)
    with pytest.raises(ValueError, match="q_list is empty, but should hold a tensor for each group"):
        grouped_flash_attn_varlen_func([], k, v, [], [])

"""What torch.compile leaves to Python: its graph breaks there and gives the same; of a whole graph it says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_ranks import LoneExchange

from refgrid_solutions.grouped_attention import (
    grouped_flash_attn_varlen_func,
    zigzag_llama3_flash_attn_varlen_func,
    zigzag_llama3_prepare,
)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Dynamo itself looks at it, where a graph goes on after a break.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
PREPARED: Any = zigzag_llama3_prepare([0, 64], 1, 4)[:4]

Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def list_form(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    outs, _ = grouped_flash_attn_varlen_func(
        [q[:4] * 2, q[4:]], k, v, [[0, 4], [0, 12]], [[0, 6], [0, 16]], causal=True
    )
    return torch.cat(outs) * 3


def zigzag(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = zigzag_llama3_flash_attn_varlen_func(
        q * 2, k, v, *PREPARED, 1, causal=True, group=LoneExchange(1, 4)
    )
    return out * 3


@pytest.mark.parametrize("step", [list_form, zigzag])
def test_a_graph_is_broken_and_the_result_is_the_same(step: Step) -> None:
    leaves = [torch.randn(16, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    torch._dynamo.reset()

    expected, found = step(*leaves), torch.compile(step, backend="aot_eager")(*leaves)

    assert torch.equal(found, expected)
    pairs = (torch.autograd.grad(out.square().sum(), leaves) for out in (found, expected))
    assert all(torch.equal(one, other) for one, other in zip(*pairs, strict=True))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (list_form, "the list form plans in every call: plan_grouped_attn once before this is compiled whole"),
        (zigzag, "zigzag attention is not compiled: it may be called between compiled graphs"),
    ],
)
def test_a_whole_graph_is_refused_with_a_reason(step: Step, words: str) -> None:
    told = [torch.randn(16, heads, 8) for heads in (4, 2, 2)]
    torch._dynamo.reset()

    with pytest.raises(torch._dynamo.exc.Unsupported, match=words):
        torch.compile(step, backend="aot_eager", fullgraph=True)(*told)

"""References of mixtures of experts against loops over tokens and experts in float64, and answers by hand."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import naive_moe
import peak_memory
import pytest
import small_moe
import torch
from small_moe import GROUPS, NAMES, NO_GROUPS, RENORM, ROUTED, ROUTED_ONE
from torch.utils._python_dispatch import TorchDispatchMode

import refgrid_references
from refgrid.dataset.case import op_of
from refgrid.proving.inputs import make_inputs
from refgrid_groundtruth import selftest
from refgrid_groundtruth.table import FAMILIES
from refgrid_references import moe

BFLOAT16 = {"atol": 2e-3, "rtol": 8e-3}  # one rounding, 2^-8 relative, and a margin near zero


def assert_near(given: torch.Tensor, expected: torch.Tensor, bound: dict[str, float]) -> None:
    torch.testing.assert_close(given.double(), expected.double(), **bound)


def draw(name: str, tokens: int, uuid: str = "w", offset: int = 4, **sizes: int) -> tuple[str, dict[str, Any]]:
    """The op and the inputs and constants of a small case."""
    of = small_moe.definition(name, **sizes)
    op = op_of(of, FAMILIES["moe"])
    made = make_inputs(of, small_moe.workload(of, tokens, uuid, offset), 0, "cpu", None)
    parameters = inspect.signature(getattr(moe, op)).parameters.values()
    constants = {p.name: of.constant(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}
    return op, {**made.tensors, **constants}


def check(op: str, given: dict[str, Any], bound: dict[str, float] = BFLOAT16) -> torch.Tensor:
    """Reference against loops; its inputs are as they were, and a second call gives the same bits."""
    before = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    function = getattr(refgrid_references, op)
    output: torch.Tensor = function(**given)
    again = function(**given)
    assert output.dtype == torch.bfloat16
    assert output.shape == given["hidden_states"].shape
    assert torch.equal(output, again)
    for name, value in before.items():
        same = (
            torch.equal(value.float(), given[name].float()) if isinstance(value, torch.Tensor) else value == given[name]
        )
        assert same, f"{name} was changed"
    assert_near(output, getattr(naive_moe, op)(**given), bound)
    return output


@pytest.mark.parametrize("tokens", [1, 2, 13, 37])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_formula(name: str, tokens: int) -> None:
    output = check(*draw(name, tokens))

    assert 0.05 < output.float().std() < 20


@pytest.mark.parametrize("uuid", ["negative", "one_expert"])
@pytest.mark.parametrize("name", NAMES)
def test_all_logits_negative_and_all_tokens_to_one_expert(name: str, uuid: str) -> None:
    check(*draw(name, 11, uuid))


@pytest.mark.parametrize("name", NAMES)
def test_few_tokens_and_rows_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op, given = draw(name, 23, "one_expert")
    whole = getattr(moe, op)(**given)
    monkeypatch.setattr(moe, "BLOCK_ROWS", 3)
    monkeypatch.setattr(moe, "block_elements", lambda _: 2000)

    assert_near(check(op, given), whole.double(), BFLOAT16)


@pytest.mark.parametrize("op", FAMILIES["moe"])
def test_the_answer_by_hand(op: str) -> None:
    given, expected = selftest.answer(op)

    assert_near(getattr(moe, op)(**given), expected["output"].double(), {"atol": 4e-3, "rtol": 1e-2})


@pytest.mark.parametrize("name", [GROUPS, NO_GROUPS])
def test_tokens_whose_experts_are_elsewhere_give_zero(name: str) -> None:
    op, given = draw(name, 5, "elsewhere")

    assert not check(op, given).any()


@pytest.mark.parametrize("offset", [0, 4, 20])
def test_the_ranks_of_all_experts_add_up(offset: int) -> None:
    """What the experts that are here add, and what all others add, is what all add."""
    op, given = draw(GROUPS, 9, offset=0, num_local_experts=32)
    whole = getattr(moe, op)(**given).double()
    parts, size = torch.zeros_like(whole), whole.abs()
    for first, end in pairwise([0, *([offset] if offset else []), offset + 11, 32]):
        here = {name: value[first:end] if name.startswith("gemm") else value for name, value in given.items()}
        part = check(op, {**here, "local_expert_offset": first}).double()
        parts, size = parts + part, size + part.abs()

    assert ((parts - whole).abs() <= 2**-8 * size).all()  # each is rounded once


def test_every_expert_may_be_chosen() -> None:
    op, given = draw(RENORM, 6, num_local_experts=10)

    check(op, given)


def test_one_expert_alone_has_weight_one() -> None:
    op, given = draw(RENORM, 4, num_local_experts=10)
    given["top_k"] = 1
    check(op, given)
    given = {k: v[:, :1] if k == "routing_logits" else v[:1] if k.startswith("gemm") else v for k, v in given.items()}

    check(op, given)


def test_an_expert_without_tokens_is_not_touched() -> None:
    op, given = draw(RENORM, 3)
    chosen = given["routing_logits"].float().topk(given["top_k"], dim=1).indices
    idle = [e for e in range(given["routing_logits"].shape[1]) if e not in chosen]
    assert idle, "every expert has a token"
    expected = getattr(moe, op)(**given)
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        given[name] = given[name].clone()
        given[name][idle] = torch.nan

    assert torch.equal(getattr(moe, op)(**given), expected)


def test_a_bias_below_every_score_still_keeps_the_groups_out() -> None:
    """Biased scores are negative: a score of 0 in place of -inf would choose from groups that are out."""
    op, given = draw(GROUPS, 9, offset=0, num_local_experts=32)
    given["routing_bias"] = given["routing_bias"] - 2

    check(op, given)


def test_the_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weight, expert = moe.route_in_groups(logits, torch.tensor([0.0, 0.0, 0.0, 1.0]).bfloat16(), 1, 1, 2)

    s = torch.sigmoid(torch.tensor([-1.0, 2.0], dtype=torch.float64))
    assert expert.tolist() == [[3, 0]]
    assert_near(weight, (s / s.sum())[None], {"atol": 1e-6, "rtol": 1e-6})


def test_scores_that_are_all_zero_give_zero_and_not_nan() -> None:
    weight, _ = moe.route_in_groups(torch.full((1, 4), -200.0), torch.arange(4.0), 2, 1, 2)

    assert weight.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("name", [small_moe.PER_TENSOR_ONE, small_moe.FP4_ONE])
def test_a_bias_is_ignored_where_one_expert_is_chosen(name: str) -> None:
    op, given = draw(name, 9)
    with_bias = (given["routing_logits"] + given["routing_bias"]).argmax(dim=1)
    assert (with_bias != given["routing_logits"].argmax(dim=1)).any(), "the bias would change no choice"
    expected = getattr(moe, op)(**given)
    given["routing_bias"] = torch.full_like(given["routing_bias"], torch.nan)

    assert torch.equal(getattr(moe, op)(**given), expected)


@pytest.mark.parametrize("bits", [0x3F80, 0xBF80, 0x8000, 0x0001, 0x7F7F, 0xC2F7, 0x00FF])
@pytest.mark.parametrize("expert", [0, 1, 31])
def test_packed_bits_are_read_again_and_not_converted(expert: int, bits: int) -> None:
    op, given = draw(ROUTED_ONE, 2)
    given["topk_ids"] = torch.tensor([[expert << 16 | bits]] * 2, dtype=torch.int32)
    weight = torch.tensor([bits if bits < 2**15 else bits - 2**16]).short().view(torch.bfloat16).double()
    alone = {**given, "topk_ids": torch.tensor([[expert << 16 | 0x3F80]] * 2, dtype=torch.int32)}

    output = getattr(moe, op)(**given)

    expected = naive_moe.trtllm_fp4_block_scale_routed_moe(**alone) * weight
    torch.testing.assert_close(output.double(), expected.bfloat16().double(), atol=0, rtol=2e-2)


def test_expert_numbers_beyond_a_signed_half_are_positive() -> None:
    op, given = draw(ROUTED_ONE, 1)
    given["topk_ids"] = torch.tensor([[0x8001_3F80 - 2**32]], dtype=torch.int32)  # expert 32769: not here

    assert not getattr(moe, op)(**given).any()


def test_weights_are_used_as_they_are() -> None:
    op, given = draw(ROUTED, 5)
    doubled = {**given, "topk_ids": given["topk_ids"] + 0x80}  # one more in the exponent

    assert_near(getattr(moe, op)(**doubled), 2 * getattr(moe, op)(**given).double(), BFLOAT16)


def test_the_second_half_is_the_gate() -> None:
    """x = 1: up = 2 and gate = 1 give 2 silu(1); the halves exchanged, silu(2)."""
    w1, w2 = torch.tensor([[[2.0], [1.0]]]), torch.ones(1, 1, 1)
    x, ids = torch.ones(1, 1).bfloat16(), torch.tensor([[0x3F80]], dtype=torch.int32)

    output = moe.trtllm_fp4_block_scale_routed_moe(ids, x, w1, w2)

    assert output.item() == pytest.approx(2 * 0.7310586, rel=4e-3)


def memory(name: str, uuid: str) -> float:
    """The most that a call holds, over the size of its inputs and outputs."""
    op, given = draw(name, 1500, uuid)
    tensors = [value for value in given.values() if isinstance(value, torch.Tensor)]
    around = sum(value.nbytes for value in tensors) + 2 * given["hidden_states"].numel()
    return float(peak_memory.peak_bytes(lambda: getattr(moe, op)(**given)) / around)


@pytest.mark.parametrize("uuid", ["w", "one_expert"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_stays_below_twice_inputs_and_outputs(name: str, uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are as small as the experts are here against published ones."""
    monkeypatch.setattr(moe, "BLOCK_ROWS", 128)
    monkeypatch.setattr(moe, "block_elements", lambda _: 2**15)

    assert 0.1 < memory(name, uuid) < 2


def test_without_blocks_of_rows_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "BLOCK_ROWS", 10**6)

    assert memory(RENORM, "one_expert") > 2


class _AsBefore210(TorchDispatchMode):
    """A CPU of PyTorch before 2.10 takes no rows of float8."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        gathers = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_select)
        if gathers and args[0].dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            raise NotImplementedError(f"{func} of {args[0].dtype}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_float8_are_taken_by_their_bytes(name: str) -> None:
    op, given = draw(name, 5)

    with _AsBefore210():
        output = getattr(moe, op)(**given)

    assert torch.equal(output, getattr(moe, op)(**given))


def test_that_would_notice_rows_taken_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "rows_of", lambda x, index: x[index])
    op, given = draw(RENORM, 5)

    with _AsBefore210(), pytest.raises(NotImplementedError, match="float8"):
        getattr(moe, op)(**given)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_float8_becomes_its_number(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(dtype).view(2, 128)

    torch.testing.assert_close(moe.widen(every), every.float(), atol=0, rtol=0, equal_nan=True)

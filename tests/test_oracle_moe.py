"""The float64 oracle of mixtures of experts against loops, and through its source as a run uses it."""

from __future__ import annotations

import inspect
from typing import Any

import naive_moe
import pytest
import small_moe
import torch
from small_moe import GROUPS, NAMES, NO_GROUPS, ROUTED

from refgrid.dataset.case import op_of
from refgrid.proving.inputs import make_inputs
from refgrid_groundtruth import Unavailable, adapter, selftest
from refgrid_groundtruth.oracle import moe
from refgrid_groundtruth.table import FAMILIES

CLOSE = {"atol": 1e-12, "rtol": 2**-8}  # the oracle rounds once, to bfloat16: half of this


def draw(name: str, tokens: int, uuid: str = "w") -> tuple[str, dict[str, Any]]:
    of = small_moe.definition(name)
    op = op_of(of, FAMILIES["moe"])
    made = make_inputs(of, small_moe.workload(of, tokens, uuid), 0, "cpu", None)
    parameters = inspect.signature(getattr(moe, op)).parameters.values()
    return op, {**made.tensors, **{p.name: of.constant(p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}}


@pytest.mark.parametrize("uuid", ["w", "negative", "one_expert"])
@pytest.mark.parametrize("tokens", [1, 19])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_formula(name: str, tokens: int, uuid: str) -> None:
    op, given = draw(name, tokens, uuid)
    before = {each: value.clone() for each, value in given.items() if isinstance(value, torch.Tensor)}

    output = getattr(moe, op)(**given)["output"]

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), getattr(naive_moe, op)(**given), **CLOSE)
    for each, value in before.items():
        assert torch.equal(value.float(), given[each].float()), f"{each} was changed"


@pytest.mark.parametrize("name", [GROUPS, NO_GROUPS])
def test_tokens_whose_experts_are_elsewhere_give_zero(name: str) -> None:
    op, given = draw(name, 5, "elsewhere")

    assert not getattr(moe, op)(**given)["output"].any()


@pytest.mark.parametrize("offset", [-2, 0])
def test_a_bias_below_every_score(offset: int) -> None:
    op, given = draw(GROUPS, 7)
    given["routing_bias"] = given["routing_bias"] + offset

    output = getattr(moe, op)(**given)["output"]

    torch.testing.assert_close(output.double(), getattr(naive_moe, op)(**given), **CLOSE)


@pytest.mark.parametrize("bits", [0x3F80, 0xBF80, 0x8000, 0x0001, 0x7F7F, 0xC2F7, 0x00FF])
def test_packed_bits_are_read_again_and_not_converted(bits: int) -> None:
    op, given = draw(ROUTED, 2)
    given["topk_ids"] = given["topk_ids"] & ~0xFFFF | bits

    output = getattr(moe, op)(**given)["output"].double()

    expected = getattr(naive_moe, op)(**given).bfloat16().double()
    torch.testing.assert_close(output, expected, atol=0, rtol=2**-7, equal_nan=True)


@pytest.mark.parametrize("op", FAMILIES["moe"])
def test_the_source_is_proven_by_its_answer(op: str) -> None:
    given, expected = selftest.answer(op)

    output = adapter("oracle", op, "cpu")(**given)["output"]

    assert output.shape == expected["output"].shape


FAULTS = [
    ("moe_fp8_block_scale_ds_routing", "routed_scaling_factor", 5.0),
    ("moe_fp8_block_scale_ds_routing", "local_expert_offset", 5),
    ("moe_fp8_block_scale_ds_routing", "routing_bias", "zero"),
    ("moe_fp8_block_scale_ds_routing", "hidden_states_scale", "swap"),
    ("moe_fp8_block_scale_ds_routing", "topk_group", 8),
    ("moe_fp8_block_scale_renorm", "gemm1_weights", "swap"),
    ("moe_fp8_block_scale_renorm", "gemm1_weights_scale", "swap"),
    ("moe_fp8_block_scale_renorm", "gemm2_weights_scale", "swap"),
    ("moe_fp8_block_scale_renorm", "top_k", 1),
    ("trtllm_fp8_per_tensor_scale_moe", "output2_scales_scalar", "roll"),
    ("trtllm_fp8_per_tensor_scale_moe", "output1_scales_scalar", "double"),
    ("trtllm_fp8_per_tensor_scale_moe", "output1_scales_gate_scalar", "double"),
    ("trtllm_fp8_per_tensor_scale_moe_topk1", "routing_logits", "zero"),
    ("trtllm_fp4_block_scale_moe", "gemm2_weights", "roll"),
    ("trtllm_fp4_block_scale_moe_topk1", "routing_logits", "double"),
    ("trtllm_fp4_block_scale_routed_moe", "topk_ids", "roll"),
]
CHANGES = {
    "zero": torch.zeros_like,
    "double": lambda value: value * 2,
    "roll": lambda value: value.roll(1, 0),
    "swap": lambda value: value.float().roll(value.shape[-2] // 2, -2).to(value.dtype),
}


@pytest.mark.parametrize(("op", "name", "change"), FAULTS, ids=str)
def test_an_adapter_that_gets_one_input_wrong_is_found_by_the_answer(op: str, name: str, change: Any) -> None:
    def wrong(**given: Any) -> dict[str, torch.Tensor]:
        given[name] = CHANGES[change](given[name]) if isinstance(change, str) else change
        result: dict[str, torch.Tensor] = getattr(moe, op)(**given)
        return result

    with pytest.raises(Unavailable, match="self-test failed"):
        selftest.run(wrong, op, "cpu")


def test_a_weight_on_the_output_in_place_of_the_input_is_found_by_the_answer() -> None:
    def wrong(routing_logits: torch.Tensor, routing_bias: torch.Tensor, **given: Any) -> dict[str, torch.Tensor]:
        del routing_bias
        table = moe.sigmoid_table(routing_logits)
        return moe._unscaled(table, given["hidden_states"], given["gemm1_weights"], given["gemm2_weights"])

    with pytest.raises(Unavailable, match="self-test failed"):
        selftest.run(wrong, "trtllm_fp4_block_scale_moe_topk1", "cpu")

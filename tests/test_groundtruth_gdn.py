"""Adapters and oracle of the gated delta rule: against loops in float64."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import naive_gdn as naive
import pytest
import torch

import refgrid_groundtruth as groundtruth
from refgrid_groundtruth import Unavailable, delta, selftest

if TYPE_CHECKING:
    from collections.abc import Callable

    Tensors = dict[str, torch.Tensor]

OPS = ("gdn_decode", "gdn_mtp", "gdn_prefill")
LENGTHS = [
    pytest.param([1], id="one token"),
    pytest.param([65], id="a chunk and one"),
    pytest.param([0, 5, 0, 70, 1, 0], id="some without tokens"),
]
SLOTS = [
    pytest.param([0], 2, 1, id="one slot"),
    pytest.param([2, 0], 3, 5, id="two of five"),
    pytest.param([3, 1, 2], 8, 4, id="eight tokens"),
]


# ---- the oracle and transformers, as they are


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_the_self_test_passes(source: str, op: str) -> None:
    assert callable(groundtruth.adapter(source, op, "cpu"))


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize("heads", [(1, 1), (2, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decode_agrees_with_the_definition(source: str, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    adapter = groundtruth.adapter(source, "gdn_decode", "cpu")
    naive.agree(adapter, "gdn_decode", naive.decode(3, heads, dtype=dtype))
    naive.agree(adapter, "gdn_decode", naive.decode(3, heads, dtype=dtype, scale=8**-0.5))


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize(("slots", "seq_len", "pool"), SLOTS)
def test_mtp_agrees_with_the_definition(source: str, slots: list[int], seq_len: int, pool: int) -> None:
    adapter = groundtruth.adapter(source, "gdn_mtp", "cpu")
    naive.agree(adapter, "gdn_mtp", naive.mtp(slots, seq_len, pool, dtype=torch.float32))


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("heads", [(2, 4), (1, 3)], ids=str)
def test_prefill_agrees_with_the_definition(source: str, lengths: list[int], heads: tuple[int, int]) -> None:
    adapter = groundtruth.adapter(source, "gdn_prefill", "cpu")
    naive.agree(adapter, "gdn_prefill", naive.prefill(lengths, heads, dtype=torch.float32))


def test_the_oracle_takes_any_scale_padding_and_no_tokens_at_all() -> None:
    oracle = importlib.import_module("refgrid_groundtruth.oracle.gdn")
    naive.agree(oracle.gdn_decode, "gdn_decode", naive.decode(2, scale=0.3))
    naive.agree(oracle.gdn_mtp, "gdn_mtp", naive.mtp([-1, 1, -2], 3, 4, scale=0.3))
    naive.agree(oracle.gdn_prefill, "gdn_prefill", naive.prefill([0, 0]))


@pytest.mark.parametrize("a", [-1e4, 40.0, 1e4])
@pytest.mark.parametrize("b", [-1e4, 1e4])
def test_the_oracle_at_the_ends_of_the_gates(a: float, b: float) -> None:
    oracle = importlib.import_module("refgrid_groundtruth.oracle.gdn")
    inputs = naive.prefill([9, 2], dtype=torch.float32)
    inputs["a"][:], inputs["b"][:] = a, b
    naive.agree(oracle.gdn_prefill, "gdn_prefill", inputs)


def test_the_oracle_is_as_close_as_float32_can_tell() -> None:
    """States of 300 tokens, some of which clear them: only the last rounding is left."""
    oracle = importlib.import_module("refgrid_groundtruth.oracle.gdn")
    inputs = naive.prefill([300], dtype=torch.float32)
    inputs["a"][::7] = 38
    state = naive.gdn_prefill(**inputs)["new_state"]
    assert torch.equal(oracle.gdn_prefill(**inputs)["new_state"], state.float())


def test_transformers_has_one_scale_and_no_padding() -> None:
    for op, inputs in (("gdn_decode", naive.decode(1, scale=0.3)), ("gdn_prefill", naive.prefill([2], scale=0.3))):
        with pytest.raises(Unavailable, match=r"unsupported: scale is 0.3 but the function's is 0.3535"):
            groundtruth.adapter("transformers", op, "cpu")(**inputs)
    with pytest.raises(Unavailable, match="unsupported: 2 of 3 sequences are padding"):
        groundtruth.adapter("transformers", "gdn_mtp", "cpu")(**naive.mtp([-1, 1, -1], 2, 3))


def test_transformers_is_asked_for_its_own_function_and_not_for_anothers_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = importlib.import_module("refgrid_groundtruth.transformers.gdn")

    def kernel(*_: Any, **__: Any) -> None:
        raise AssertionError("another library's kernel was called")

    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        own = module.inspect.unwrap(getattr(module.modeling_qwen3_next, name))
        monkeypatch.setattr(kernel, "__wrapped__", own, raising=False)
        monkeypatch.setattr(module.modeling_qwen3_next, name, kernel)
        op = "gdn_prefill" if "chunk" in name else "gdn_decode"
        inputs = naive.prefill([3]) if op == "gdn_prefill" else naive.decode(1)
        naive.agree(getattr(module, op), op, inputs)


def test_gates_are_those_of_the_definition() -> None:
    log_g, beta = delta.gates(
        torch.tensor([math.log(2)]), torch.tensor([[1.5]]), torch.tensor([-1.5]), torch.tensor([[math.log(3)]])
    )
    assert log_g.item() == pytest.approx(-2 * math.log(2))
    assert beta.item() == pytest.approx(0.75)


def test_sequences_with_tokens() -> None:
    rows, starts = delta.with_tokens(torch.tensor([0, 0, 2, 2, 2, 7]))
    assert rows.tolist() == [1, 4]
    assert starts.tolist() == [0, 2, 7]


# ---- the self-test notices a library that means something else by it


def _wrong(op: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[..., Tensors]:
    oracle = importlib.import_module("refgrid_groundtruth.oracle.gdn")

    def adapter(**inputs: Any) -> Tensors:
        given: Tensors = getattr(oracle, op)(**change(inputs))
        return given

    return adapter


FAULTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "states transposed": lambda x: {n: v.mT if n in ("state", "initial_state") else v for n, v in x.items()},
    "no decay bias": lambda x: {**x, "dt_bias": torch.zeros(8)},
    "no rate": lambda x: {**x, "A_log": torch.zeros(8)},
    "no decay": lambda x: {**x, "a": torch.full_like(x["a"], -100)},
    "beta of one": lambda x: {**x, "b": torch.full_like(x["b"], 100)},
    "keys of another head": lambda x: {**x, "k": x["k"].flip(-2)},
    "queries of another head": lambda x: {**x, "q": x["q"].flip(-2)},
    "values of another head": lambda x: {**x, "v": x["v"] + 1},
    "scale 0 as it is": lambda x: {**x, "scale": 1e-30},
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_fires(op: str, fault: str) -> None:
    with pytest.raises(Unavailable, match=r"self-test failed: got \w+\[.*but should be"):
        selftest.run(_wrong(op, FAULTS[fault]), op, "cpu")


def test_the_self_test_of_drafts_notices_swapped_slots_and_rows() -> None:
    swapped: dict[str, Any] = {"initial_state_indices": torch.tensor([0, 2], dtype=torch.int32)}
    with pytest.raises(Unavailable, match="self-test failed"):
        selftest.run(_wrong("gdn_mtp", lambda x: {**x, **swapped}), "gdn_mtp", "cpu")

    def by_slot(**inputs: Any) -> Tensors:
        given = _wrong("gdn_mtp", lambda x: x)(**inputs)
        given["intermediate_states"] = given["intermediate_states"][[1, 2, 0]]
        return given

    with pytest.raises(Unavailable, match="self-test failed: got intermediate_states"):
        selftest.run(by_slot, "gdn_mtp", "cpu")

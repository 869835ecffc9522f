"""Mixtures of experts by libraries: against loops over tokens and experts, on doubles where a GPU would be needed."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from typing import TYPE_CHECKING, Any

import doubles_moe
import naive_moe
import pytest
import small_moe
import torch
from adapters import unchanged
from small_moe import FP4, FP4_ONE, GROUPS, NAMES, NO_GROUPS, RENORM, ROUTED

import refgrid_groundtruth as groundtruth
from refgrid.dataset.case import op_of
from refgrid.proving.inputs import make_inputs
from refgrid_groundtruth import SOURCES, Unavailable, experts
from refgrid_groundtruth.table import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from types import ModuleType

    from refgrid_groundtruth import Adapter

TOKENS = 6
LIBRARIES = {"flashinfer": "flashinfer_python-0.6.12", "sglang": "sglang-0.5.15"}
OP = {name: op_of(small_moe.definition(name), FAMILIES["moe"]) for name in NAMES}


def draw(name: str, offset: int = 4, **sizes: int) -> dict[str, Any]:
    """Inputs and constants of a small case; bfloat16 holds what its fp8 hidden states stand for."""
    of = small_moe.definition(name, **sizes)
    given: dict[str, Any] = dict(make_inputs(of, small_moe.workload(of, TOKENS, offset=offset), 0, "cpu", None).tensors)
    if "hidden_states_scale" in given:
        given["hidden_states_scale"] = 2.0 ** given["hidden_states_scale"].log2().round()
    parameters = inspect.signature(getattr(naive_moe, OP[name])).parameters.values()
    constants = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "dtype"]
    return {**given, **{constant: of.constant(constant) for constant in constants}}


def agrees(adapter: Adapter, op: str, given: dict[str, Any]) -> torch.Tensor:
    """The adapter against the loops; its inputs are as they were."""
    output = unchanged(adapter, **given)["output"]

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), getattr(naive_moe, op)(**given), rtol=8e-3, atol=2e-3)
    return output


# ---- transformers


@pytest.mark.parametrize("name", NAMES)
def test_transformers_agrees_with_the_definition(name: str) -> None:
    assert agrees(groundtruth.adapter("transformers", OP[name], "cpu"), OP[name], draw(name)).any()


def test_transformers_takes_a_gate_that_leaves_the_choice_to_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("refgrid_groundtruth.transformers.moe")
    monkeypatch.setattr(module.modeling_deepseek_v3, "DeepseekV3MoE", doubles_moe.OlderBlock)
    given = draw(GROUPS)
    options = {name: given[name] for name in ("n_group", "topk_group", "routed_scaling_factor")}

    logits, bias = given["routing_logits"], given["routing_bias"]
    expert, weight = module._deepseek_routing(logits, bias, **options, num_experts_per_tok=given["top_k"])

    wanted = doubles_moe.deepseek(logits, bias, given["n_group"], given["topk_group"], given["top_k"], 2.5)
    assert torch.equal(expert, wanted[1])
    assert torch.equal(weight, wanted[0])


def test_transformers_writes_out_only_what_tokens_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts of a layer in float32 can be 68 GB."""
    module = importlib.import_module("refgrid_groundtruth.transformers.moe")
    adapter = groundtruth.adapter("transformers", OP[RENORM], "cpu")
    written: list[torch.Size] = []
    right = module.dequantised

    def note(weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        written.append(weights.shape)
        return right(weights, scale)

    monkeypatch.setattr(module, "dequantised", note)
    given = draw(RENORM)

    adapter(**{**given, "routing_logits": given["routing_logits"][:1].expand(TOKENS, -1)})

    assert sorted(written) == sorted([(256, 256), (256, 128)] * given["top_k"]), "an expert at a time, each once"


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "halves in the wrong order": ("gate_first", lambda _: lambda w: w),
    "bias left out": ("_deepseek_routing", lambda right: lambda z, b, **o: right(z, b * 0, **o)),
    "factor left out": (
        "_deepseek_routing",
        lambda right: lambda z, b, **o: right(z, b, **{**o, "routed_scaling_factor": 1.0}),
    ),
    "groups left out": (
        "_deepseek_routing",
        lambda right: lambda z, b, **o: right(z, b, **{**o, "n_group": 1, "topk_group": 1}),
    ),
    "offset left out": ("on_this_rank", lambda right: lambda e, _, count, elsewhere: right(e, 0, count, elsewhere)),
    "an expert too few": ("_qwen3_routing", lambda right: lambda z, k: right(z, k - 1)),
    "weight left out": ("_llama4_routing", lambda right: lambda z: (right(z)[0], torch.ones(len(z)))),
    "weights read as numbers": ("unpacked", lambda _: lambda ids: (ids >> 16, (ids & 0xFFFF).float())),
}
SEEN = [
    ("halves in the wrong order", "moe_fp8_block_scale_ds_routing"),
    ("halves in the wrong order", "moe_fp8_block_scale_renorm"),
    ("halves in the wrong order", "trtllm_fp4_block_scale_moe"),
    ("halves in the wrong order", "trtllm_fp4_block_scale_moe_topk1"),
    ("bias left out", "moe_fp8_block_scale_ds_routing"),
    ("factor left out", "moe_fp8_block_scale_ds_routing"),
    ("groups left out", "moe_fp8_block_scale_ds_routing"),
    ("offset left out", "moe_fp8_block_scale_ds_routing"),
    ("an expert too few", "trtllm_fp8_per_tensor_scale_moe"),
    ("weight left out", "trtllm_fp8_per_tensor_scale_moe_topk1"),
    ("weights read as numbers", "trtllm_fp4_block_scale_routed_moe"),
]


@pytest.mark.parametrize(("fault", "op"), SEEN)
def test_the_self_test_notices(monkeypatch: pytest.MonkeyPatch, fault: str, op: str) -> None:
    module = importlib.import_module("refgrid_groundtruth.transformers.moe")
    name, spoil = FAULTS[fault]
    monkeypatch.setattr(module, name, spoil(getattr(module, name)))

    with pytest.raises(Unavailable, match="self-test failed: got output"):
        groundtruth.adapter("transformers", op, "cpu")


# ---- what several adapters read alike


def test_numbers_of_other_ranks_are_told_apart() -> None:
    expert = torch.tensor([[3, 4, 11, 12]], dtype=torch.int32)

    here = experts.on_this_rank(expert, 4, 8, elsewhere=-1)

    assert here.tolist() == [[-1, 0, 7, -1]]
    assert here.dtype == torch.int32


def test_a_packed_number_holds_the_bits_of_its_weight() -> None:
    expert, weight = experts.unpacked(torch.tensor([[0x0000_BF00, 0x007F_3F80, 0x0020_0001]], dtype=torch.int32))

    assert expert.tolist() == [[0, 127, 32]]
    assert weight.tolist() == [[-0.5, 1.0, 2.0**-133]]
    assert (expert.dtype, weight.dtype) == (torch.int32, torch.float32)


def test_a_weight_is_narrowed_only_where_nothing_is_lost() -> None:
    weights = draw(FP4)["gemm1_weights"].clone()

    assert torch.equal(experts.in_bfloat16(weights).float(), weights)
    assert torch.equal(experts.in_bfloat16(weights, experts.gate_first).float(), experts.gate_first(weights))
    weights[3, 2, 1] = 1 + 2.0**-9
    with pytest.raises(Unavailable, match="unsupported: expert 3 has a weight that bfloat16 does not hold"):
        experts.in_bfloat16(weights)


# ---- FlashInfer and SGLang


@pytest.fixture
def doubles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The adapters of both libraries over their doubles, served on the CPU; gives the adapters' modules."""
    ours = [f"refgrid_groundtruth.{library}.moe" for library in LIBRARIES]
    theirs = [name for name in sys.modules if name.partition(".")[0] in LIBRARIES]
    held = {name: sys.modules.pop(name) for name in (*ours, *theirs) if name in sys.modules}
    _install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module, contents in doubles_moe.MODULES.items():
        vars(importlib.import_module(module)).update(contents)
    here = [dataclasses.replace(source, devices=("cpu",)) for source in SOURCES if source.library in LIBRARIES]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    monkeypatch.setattr(doubles_moe.ServerArgs, "published", None)
    doubles_moe.called.clear()
    yield dict(zip(LIBRARIES, map(importlib.import_module, ours), strict=True))
    for name in [name for name in sys.modules if name in ours or name.partition(".")[0] in LIBRARIES]:
        del sys.modules[name]
    sys.modules.update(held)


def _install(site: Path) -> None:
    for distribution in LIBRARIES.values():
        name, _, version = distribution.replace("_", "-").rpartition("-")
        info = site / f"{distribution}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for module in doubles_moe.MODULES:
        package = site
        for part in module.split("."):
            package /= part
            package.mkdir(exist_ok=True)
            (package / "__init__.py").touch()


DOUBLED = [
    (source.name, name)
    for source in SOURCES
    for name in NAMES
    if source.library in LIBRARIES and OP[name] in source.ops and (source.name, name) != ("flashinfer", NO_GROUPS)
]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("source", "name"), DOUBLED)
def test_a_library_agrees_with_the_definition_through_its_double(source: str, name: str) -> None:
    assert agrees(groundtruth.adapter(source, OP[name], "cpu"), OP[name], draw(name)).any()


def test_every_op_has_two_libraries() -> None:
    for op in FAMILIES["moe"]:
        assert {"transformers", "sglang"} <= {source.name for source in SOURCES if op in source.ops}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize(("name", "on_input"), [(FP4, False), (FP4_ONE, True), (ROUTED, False)])
def test_sglang_is_told_which_weight_is_on_the_input_and_that_its_input_stays(name: str, on_input: bool) -> None:
    groundtruth.adapter("sglang", OP[name], "cpu")(**draw(name))

    config = doubles_moe.called["fused_moe"].config
    assert config == doubles_moe.MoeRunnerConfig(inplace=False, apply_router_weight_on_input=on_input)


@pytest.mark.usefixtures("doubles")
def test_sglang_gets_the_blocks_of_the_definition() -> None:
    given = draw(RENORM)
    groundtruth.adapter("sglang", OP[RENORM], "cpu")(**given)

    call = doubles_moe.called["fused_moe"]
    assert (call.use_fp8_w8a8, call.block_shape, call.w1.dtype) == (True, [128, 128], torch.float8_e4m3fn)
    assert torch.equal(call.w1_scale[:, 0], given["gemm1_weights_scale"][:, 1]), "the gate's scales go with it"


def test_sglangs_settings_are_left_alone_where_there_are_some(doubles: dict[str, ModuleType]) -> None:
    doubles["sglang"]._set_up()
    assert doubles_moe.ServerArgs.get().model_path == "dummy"

    doubles_moe.ServerArgs("a server's own").publish()
    doubles["sglang"]._set_up()

    assert doubles_moe.ServerArgs.get().model_path == "a server's own"


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("source", ["flashinfer", "sglang"])
def test_all_experts_may_be_here_or_none_that_was_chosen(source: str) -> None:
    adapter = groundtruth.adapter(source, OP[GROUPS], "cpu")
    given = draw(GROUPS, offset=0, num_local_experts=32)

    agrees(adapter, OP[GROUPS], given)

    if source == "flashinfer":
        assert doubles_moe.called["cutlass_fused_moe"].ep_size == 1
    routes = doubles_moe.deepseek(given["routing_logits"], given["routing_bias"], 8, 4, given["top_k"], 1.0)
    idle = next(e for e in range(32) if not (routes[1] == e).any())
    one = {name: value[:1] if name.startswith("gemm") else value for name, value in given.items()}
    assert not agrees(adapter, OP[GROUPS], {**one, "local_expert_offset": idle}).any()


@pytest.mark.usefixtures("doubles")
def test_what_flashinfers_router_declines_is_unsupported() -> None:
    adapter = groundtruth.adapter("flashinfer", OP[NO_GROUPS], "cpu")

    with pytest.raises(Unavailable, match=r"unsupported: Invalid configuration: .* must be >= topk \(8\)"):
        adapter(**draw(NO_GROUPS))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("source", ["flashinfer", "sglang"])
def test_weights_off_the_grid_are_declined(source: str) -> None:
    adapter, given = groundtruth.adapter(source, OP[FP4], "cpu"), draw(FP4)

    with pytest.raises(Unavailable, match="expert 0 has a weight that bfloat16 does not hold"):
        adapter(**{**given, "gemm2_weights": given["gemm2_weights"] + 1e-3})

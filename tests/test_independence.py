"""Sources that are declared two truths are two: by what the profiler saw of them, here and as committed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from observed_kernels import findings, main, observed, parts, shortened, telling

from refgrid.sources import Sources
from refgrid_groundtruth import Unavailable

COMMITTED = sorted((Path(__file__).parents[1] / "results" / "independence").glob("*.json"))
# Sources since the file was written; whoever observes anew empties this.
LATER = {"cu130-overlay_on_nvidia_h200": {("gemm", "oracle")}}
X = torch.ones(2, 8)


def op_of(definition: str, ops: Collection[str]) -> str:
    """Of a definition, or of an op by its own name, under which a source stands of which the profiler saw nothing."""
    return max((op for op in ops if f"{definition}_".startswith(f"{op}_")), key=len)


def unexplained(told: Mapping[str, Any], sources: Sources) -> set[tuple[str, str]]:
    """Each op and source of which a file tells neither what ran nor why nothing is known of it."""
    ran = {(row["op"], row["source"]) for row in told["observed"]}
    reasons = ((key.partition(", "), why) for key, why in told["unknown"].items())
    refused = {(op_of(name, sources.ops), source) for (source, _, name), why in reasons if why}
    return {(op, source) for op in sources.ops for source in sources.serving(op)} - ran - refused


def own_name(source: str, _op: str) -> str:
    return source


def test_two_sources_of_one_kernel_are_found_and_named() -> None:
    ran = {("rmsnorm", name): {"aten::mul", "flashinfer::norm::RMSNormKernel"} for name in ("flashinfer", "sglang")}

    (told,) = findings(ran, own_name)

    assert told == (
        "rmsnorm: flashinfer and sglang both ran flashinfer::norm::RMSNormKernel, "
        "but are declared two truths: flashinfer, and sglang"
    )
    assert not list(findings(ran, lambda *_: "norm.cuh"))


def test_a_call_that_a_library_routes_to_another_is_seen_by_the_profiler() -> None:
    def direct() -> Any:
        return torch.nn.functional.rms_norm(X, (8,))

    def routed() -> Any:
        return torch.nn.RMSNorm(8)(X * 1)

    def formula() -> Any:
        return X * (X * X).mean(-1, keepdim=True).rsqrt()

    calls = {"direct": direct, "routed": routed, "formula": formula}
    ran = {("rmsnorm", name): observed(call) for name, call in calls.items()}

    (told,) = findings(ran, own_name)

    assert told.startswith("rmsnorm: direct and routed both ran aten::")
    assert "rms_norm" in told
    assert "aten::mul" in ran["rmsnorm", "formula"]


def test_the_command_writes_what_it_saw_why_it_saw_nothing_else_and_ends_1_for_one_kernel(
    tmp_path: Path, double: dict[str, Any], write_definition: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def adapter(name: str, _op: str, _device: str) -> Any:
        if name == "absent":
            raise Unavailable("missing", "absent is not installed")
        return lambda x: {"y": torch.nn.functional.rms_norm(x, (4,))}

    write_definition(double, 1)
    names = ("one", "two", "absent")
    table = tuple(SimpleNamespace(name=name, ops=("double",), distribution="torch") for name in names)
    sources = Sources((SimpleNamespace(SOURCES=table, adapter=adapter),))
    monkeypatch.setattr("observed_kernels.Sources", lambda: sources)
    asked = ["--environment=local", "--device=cpu", f"--dataset={tmp_path}", str(tmp_path / "kept/local.json")]

    done = CliRunner().invoke(main, asked)

    told = json.loads((tmp_path / "kept/local.json").read_text())
    assert done.exit_code == 1, done.output
    assert "double: one and two both ran aten::" in done.output
    assert [row["source"] for row in told["observed"]] == ["one", "two"]
    assert told["unknown"] == {"absent, double_n4": "missing: absent is not installed"}


def test_kernels_of_different_ops_and_elementary_ones_are_nothing_shared() -> None:
    different = {("a", "one"): {"flashinfer::K"}, ("b", "two"): {"flashinfer::K"}}
    pytorchs = {"aten::mm", "at::native::reduce_kernel", "nvjet_tst_64x8"}
    elementary = {("a", "one"): pytorchs, ("a", "two"): pytorchs}

    assert not list(findings(different, own_name))
    assert not list(findings(elementary, own_name))
    assert telling({"aten::mm", "aten::_scaled_dot_product_flash_attention", "_fwd_kernel"}) == {
        "aten::_scaled_dot_product_flash_attention",
        "_fwd_kernel",
    }


def test_operators_of_pytorch_and_our_own_hand_on_and_are_nothing_shared() -> None:
    names = {"softmax_warp_forward", "elementwise_kernel_with_index", "refgrid::grouped_attn_forward"}

    assert telling({*names, "my_softmax_warp_forward", "softmax_warp_forward_of_mine"}) == {
        "my_softmax_warp_forward",
        "softmax_warp_forward_of_mine",
    }


def test_a_part_of_two_sources_is_told_and_is_no_kernel_that_they_share() -> None:
    merge = "flashinfer::PersistentVariableLengthMergeStatesKernel"
    ran = {("op", "one"): {"flashinfer::A", merge}, ("op", "two"): {"flashinfer::B", merge}, ("op", "three"): {"C"}}

    assert list(findings(ran, own_name)) == []
    assert parts(ran) == [f"op: one and two both ran {merge}, which merges what blocks of keys came to"]
    assert list(findings({**ran, ("op", "two"): {"flashinfer::A", merge}}, own_name))


@pytest.mark.parametrize(
    ("name", "short"),
    [
        (
            "void flashinfer::norm::RMSNormKernel<8u, __nv_bfloat16>(__nv_bfloat16*, float)",
            "flashinfer::norm::RMSNormKernel",
        ),
        ("void at::native::(anonymous namespace)::cat<f<int>, 4>(int)", "at::native::cat"),
        ("void cutlass::device_kernel<deep_gemm::A<cute::C<1>>>(P)", "cutlass::device_kernel<deep_gemm::A>"),
        ("_fwd_kernel_stage1", "_fwd_kernel_stage1"),
        ("aten::mul", "aten::mul"),
    ],
)
def test_a_kernel_is_known_by_its_namespace_and_function(name: str, short: str) -> None:
    assert shortened(name) == short


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_what_is_declared_today_agrees_with_what_was_observed(file: Path) -> None:
    told = json.loads(file.read_text())
    sources = Sources()
    ran = {(row["op"], row["source"]): row["ran"].split() for row in told["observed"]}

    assert ran
    assert all(ran.values())
    assert list(findings(ran, sources.kernel)) == []
    assert parts(ran) == told.get("parts", [])
    for row in told["observed"]:
        assert sources.kernel(row["source"], row["op"]) == row["declared"], f"{file.name} is stale: observe it anew"


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_what_was_not_observed_has_a_reason(file: Path) -> None:
    assert unexplained(json.loads(file.read_text()), Sources()) == LATER.get(file.stem, set())


@pytest.mark.parametrize(
    ("unknown", "missing"),
    [
        pytest.param({"two, gemm_n128_k2048": "missing: two is not installed"}, set(), id="refused"),
        pytest.param({"two, gemm": "the profiler saw nothing"}, set(), id="not seen"),
        pytest.param({}, {("gemm", "two")}, id="not told"),
        pytest.param({"two, gemm": ""}, {("gemm", "two")}, id="no reason"),
        pytest.param({"two, gemm_fp8_n128": "missing: two"}, {("gemm", "two")}, id="of another op"),
    ],
)
def test_a_source_that_was_neither_observed_nor_refused_is_named(
    unknown: Mapping[str, str], missing: set[tuple[str, str]]
) -> None:
    table = (SimpleNamespace(name="one", ops=("gemm", "gemm_fp8")), SimpleNamespace(name="two", ops=("gemm",)))
    observed_rows = [{"op": op, "source": "one"} for op in ("gemm", "gemm_fp8")]

    told = {"observed": observed_rows, "unknown": unknown}

    assert unexplained(told, Sources((SimpleNamespace(SOURCES=table),))) == missing


def test_something_was_observed_and_committed() -> None:
    assert COMMITTED

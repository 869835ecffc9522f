"""The ground-truth table, what makes a source unavailable, and the adapters against answers known by other means."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

import refgrid_groundtruth as groundtruth
from refgrid.dataset.case import op_of
from refgrid.dataset.definition import load_dataset
from refgrid.sources import Sources
from refgrid_groundtruth import SOURCES, Source, Unavailable, selftest
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DATASET = load_dataset(Path(__file__).parents[1])
ALL = [(source, op) for source in SOURCES for op in source.ops]
NAMED = {source.name: source for source in SOURCES}
ON_CPU = [(source.name, op) for source in SOURCES if "cpu" in source.devices for op in source.ops]


def refusal(source: str, op: str = "rmsnorm", device: str = "cpu") -> Unavailable:
    with pytest.raises(Unavailable) as caught:
        groundtruth.adapter(source, op, device)
    return caught.value


# ---- the table


@pytest.mark.parametrize(
    ("module", "loads"),
    [
        pytest.param("refgrid_groundtruth", [], id="the table imports nothing"),
        pytest.param("refgrid_groundtruth.torch.norm", ["torch"], id="an adapter does, and the check notices"),
    ],
)
def test_importing_the_table_imports_no_library(module: str, loads: list[str]) -> None:
    libraries = sorted({source.library for source in SOURCES})
    code = f"import sys, {module}; print([name for name in {libraries} if name in sys.modules])"

    command = [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path}; {code}"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)

    assert told.stdout.strip() == str(loads), told.stderr


def function_of(source: Source, op: str) -> ast.FunctionDef:
    """The adapter as written: its library need not be installed."""
    file = Path(groundtruth.__path__[0], source.folder, f"{FAMILY[op]}.py")
    named = {node.name: node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)}
    assert op in named, f"{file} has no function {op}"
    return named[op]


@pytest.mark.parametrize(("source", "op"), ALL, ids=[f"{source.name}-{op}" for source, op in ALL])
def test_an_adapter_takes_every_input_of_every_definition_of_its_op(source: Source, op: str) -> None:
    arguments = function_of(source, op).args
    names = [a.arg for a in (*arguments.args, *arguments.kwonlyargs)]
    optional = {a.arg for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None}
    optional |= {a.arg for a in arguments.args[len(arguments.args) - len(arguments.defaults) :]}
    served = [d for d in DATASET.definitions.values() if op_of(d, FAMILY) == op]

    assert served, f"no definition is of {op}"
    for definition in served:
        assert set(definition.inputs) <= set(names), definition.name
        for constant in set(names) - optional - set(definition.inputs):
            definition.constant(constant)
    assert set(source.options.get(op, {})) <= optional | {a.arg for a in arguments.kwonlyargs}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_what_a_source_needs_is_what_its_modules_call(source: Source) -> None:
    for op, paths in source.needs.items():
        file = Path(groundtruth.__path__[0], source.folder, f"{FAMILY[op]}.py")
        for path in paths:
            assert path.rpartition(".")[2] in file.read_text(), f"{file} never names {path}"


def test_names_are_unique_and_every_op_has_a_self_test() -> None:
    assert len(NAMED) == len(SOURCES)
    assert {op for source in SOURCES for op in source.ops} == set(FAMILY)
    assert all(selftest.answer(op) for op in FAMILY)


@pytest.mark.parametrize(
    ("source", "op", "words"),
    [
        ("touch", "rmsnorm", "unknown source 'touch': should be one of torch, transformers, flashinfer"),
        ("transformers", "gemm", "transformers has no op 'gemm': should be one of rmsnorm, fused_add_rmsnorm"),
    ],
)
def test_an_unknown_name_lists_the_legal_ones(source: str, op: str, words: str) -> None:
    with pytest.raises(LookupError, match=words):
        groundtruth.adapter(source, op, "cpu")


# ---- what makes a source unavailable


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a small library `acme` with the given modules, and makes it the source `acme` of rmsnorm."""
    monkeypatch.syspath_prepend(str(tmp_path))
    fake = Source("acme", "acme", "acme-kernels", ">=1,<2", {"rmsnorm": ("acme.norm.rmsnorm",)})
    monkeypatch.setattr(groundtruth, "SOURCES", (*SOURCES, fake))

    def write(version: str = "1.5", **modules: str) -> None:
        for name, text in {"__init__": "", **modules}.items():
            file = tmp_path / "acme" / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            monkeypatch.delitem(sys.modules, "acme" if name == "__init__" else f"acme.{name}", raising=False)
        folder = tmp_path / f"acme_kernels-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: acme-kernels\nVersion: {version}\n")
        importlib.invalidate_caches()

    yield write
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


def test_a_library_that_is_absent_is_missing(install: Callable[..., None]) -> None:
    del install  # for the source; the library is never written
    assert (refusal("acme").verdict, refusal("acme").reason) == ("missing", "acme is not installed (acme-kernels)")


def test_missing_is_told_before_the_device(install: Callable[..., None]) -> None:
    del install
    assert refusal("acme", device="tpu").verdict == "missing"


@pytest.mark.parametrize(
    ("modules", "verdict", "words"),
    [
        pytest.param(
            {"__init__": "raise ImportError('libcudart.so.12: cannot open shared object file')"},
            "import-fail",
            "import of acme raises ImportError: libcudart.so.12: cannot open",
            id="a CUDA library is not found",
        ),
        pytest.param(
            {"__init__": "import surely_not_installed"},
            "import-fail",
            "ModuleNotFoundError: No module named 'surely_not_installed'",
            id="a dependency is not installed",
        ),
        pytest.param(
            {"__init__": "import math; math.no_such"}, "import-fail", "raises AttributeError", id="a clash of versions"
        ),
        pytest.param({"norm": "import acme_core_x"}, "import-fail", "acme_core_x", id="a dependency of a submodule"),
        pytest.param({}, "api-absent", "acme has no module acme.norm", id="no such submodule"),
        pytest.param({"norm": ""}, "api-absent", "acme has no acme.norm.rmsnorm", id="no such function"),
    ],
)
def test_broken_and_absent_are_told_apart(
    install: Callable[..., None], modules: dict[str, str], verdict: str, words: str
) -> None:
    install(**modules)

    told = refusal("acme")

    assert told.verdict == verdict
    assert words in told.reason


@pytest.mark.parametrize("version", ["0.9", "2.0"])
def test_a_release_out_of_range_is_unsupported(install: Callable[..., None], version: str) -> None:
    install(version, __init__="raise RuntimeError('must not be imported')")

    assert refusal("acme").reason == f"acme-kernels {version} but should be >=1,<2"
    assert refusal("acme").verdict == "unsupported"


def test_a_device_that_a_source_does_not_serve_is_unsupported(install: Callable[..., None]) -> None:
    install()
    told = refusal("acme", device="tpu")
    assert (told.verdict, told.reason) == ("unsupported", "acme serves cpu, cuda, not tpu")


@pytest.mark.parametrize("wrong", ["value", "nan", "shape", "dtype", "name", "nothing"])
def test_a_wrong_answer_in_the_self_test_is_an_error(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    module = importlib.import_module("refgrid_groundtruth.torch.norm")
    right = module.rmsnorm
    spoil: dict[str, Callable[[torch.Tensor], dict[str, torch.Tensor]]] = {
        "value": lambda x: {"output": x * 1.25},
        "nan": lambda x: {"output": x * math.nan},
        "shape": lambda x: {"output": x[:1]},
        "dtype": lambda x: {"output": x.float()},
        "name": lambda x: {"normed": x},
        "nothing": lambda _: {},
    }
    monkeypatch.setattr(
        module,
        "rmsnorm",
        lambda hidden_states, weight, *, eps: spoil[wrong](right(hidden_states, weight, eps=eps)["output"]),
    )

    told = refusal("torch")

    assert told.verdict == "error"
    assert told.reason.startswith("self-test failed: got ")
    assert "but should be" in told.reason


@pytest.mark.parametrize("op", ["gqa_paged_decode", "gqa_paged_prefill_causal"])
@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda x: {**x, "sm_scale": x["sm_scale"] * 2}, id="scale"),
        pytest.param(lambda x: {**x, "kv_indices": x["kv_indices"].flip(0)}, id="swapped pages"),
        pytest.param(lambda x: {**x, "kv_last_page_len": x["kv_last_page_len"] - 1}, id="a key too few"),
        pytest.param(lambda x: {**x, "kv_last_page_len": x["kv_last_page_len"] + 1}, id="a key too many"),
        pytest.param(lambda x: {**x, "q": x["q"].flip(1)}, id="query heads reversed"),
        pytest.param(lambda x: {**x, "v_cache": x["v_cache"].flip(2)}, id="key heads reversed"),
    ],
)
def test_the_self_test_of_attention_notices(
    monkeypatch: pytest.MonkeyPatch, op: str, spoil: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    module = importlib.import_module("refgrid_groundtruth.torch.gqa")
    right = getattr(module, op)
    monkeypatch.setattr(module, op, lambda **inputs: right(**spoil(inputs)))

    assert refusal("torch", op).reason.startswith("self-test failed: got ")


def test_the_self_test_notices_an_lse_in_base_e(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("refgrid_groundtruth.torch.gqa")
    right = module.gqa_paged_decode
    monkeypatch.setattr(module, "gqa_paged_decode", lambda **x: {**right(**x), "lse": right(**x)["lse"] * math.log(2)})

    assert (
        "self-test failed: got lse[0, 0] = 1.79176 but should be 2.58496" in refusal("torch", "gqa_paged_decode").reason
    )


@pytest.mark.parametrize(
    ("raised", "verdict", "words"),
    [
        (
            RuntimeError("Could not find nvcc and default cuda_home='/x' doesn't exist"),
            "no-compiler",
            "build failed: Could",
        ),
        (RuntimeError("Ninja build failed.\n1/2\nnorm.cu(7): error: unsupported type"), "error", "norm.cu(7): error"),
        (TypeError("plan() got an unexpected keyword"), "error", "self-test raised TypeError: plan() got"),
        (RuntimeError("Unsupported head_dim: 128"), "unsupported", "Unsupported head_dim: 128"),
    ],
)
def test_an_exception_in_the_self_test_is_told_by_what_it_is(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, verdict: str, words: str
) -> None:
    calls = []

    def fail(**inputs: Any) -> dict[str, torch.Tensor]:
        calls.append(inputs)
        raise raised

    monkeypatch.setattr(importlib.import_module("refgrid_groundtruth.torch.norm"), "rmsnorm", fail)

    assert refusal("torch").verdict == verdict
    assert words in refusal("torch").reason
    assert len(calls) == 1, "a failed build must not be tried again"


def test_a_cuda_source_without_a_device_or_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Unavailable, match="sees no CUDA device") as none:
        selftest.demand_device(NAMED["flashinfer"], "cuda")
    assert none.value.verdict == "unsupported"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(Unavailable, match=r"A100 has compute capability 8\.0 but flashinfer-fa3 needs 9\.0 exactly"):
        selftest.demand_device(NAMED["flashinfer-fa3"], "cuda:0")

    monkeypatch.setattr(selftest, "has_compiler", lambda: False)
    with pytest.raises(Unavailable, match="no nvcc") as compiler:
        selftest.demand_device(NAMED["flashinfer-fa2"], "cuda")
    assert compiler.value.verdict == "no-compiler"

    selftest.demand_device(NAMED["torch"], "cuda")


def test_the_compiler_is_looked_for_where_cuda_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    before = selftest.has_compiler()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()

    assert selftest.has_compiler()
    assert not before or Path("/usr/local/cuda/bin/nvcc").is_file()


def test_a_warning_of_a_library_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("refgrid_groundtruth.torch.gemm")
    right = module.gemm

    def warn(A: torch.Tensor, B: torch.Tensor) -> Any:  # noqa: N803
        import warnings

        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        return right(A, B)

    monkeypatch.setattr(module, "gemm", warn)
    with pytest.warns(DeprecationWarning, match="deprecated"):
        groundtruth.adapter("torch", "gemm", "cpu")


# ---- the adapters that run on a CPU


def test_adapters_keep_the_signature_that_tells_their_constants() -> None:
    parameters = inspect.signature(groundtruth.adapter("torch", "rmsnorm", "cpu")).parameters

    assert parameters["eps"].kind is inspect.Parameter.KEYWORD_ONLY
    assert groundtruth.adapter("torch", "rmsnorm", "cpu") is groundtruth.adapter("torch", "rmsnorm", "cpu")


@pytest.mark.parametrize(("source", "op"), ON_CPU)
def test_every_source_of_the_cpu_passes_its_self_test(source: str, op: str) -> None:
    assert callable(groundtruth.adapter(source, op, "cpu"))


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        pytest.param("Unsupported group_size: 5", True, id="size"),
        pytest.param("head_dim 512 is not supported", True, id="not supported"),
        pytest.param("CUDA error: operation not supported", False, id="driver"),
        pytest.param("CUBLAS_STATUS_NOT_SUPPORTED, feature not supported", False, id="cublas"),
        pytest.param("nvcc fatal: Unsupported gpu architecture", False, id="compiler"),
        pytest.param("an illegal memory access was encountered", False, id="fault"),
    ],
)
def test_only_a_refusal_in_words_is_unsupported(words: str, refusal: bool) -> None:
    assert groundtruth._is_refusal(RuntimeError(words)) is refusal


@pytest.mark.parametrize("op", [op for source in SOURCES for op in source.judges])
def test_the_referee_knows_the_answer_of_every_op_that_it_judges(op: str) -> None:
    given, expected = selftest.answer(op)

    found = groundtruth.referee(op, "cpu")(**given)

    assert set(found) == set(expected)
    for name, tensor in found.items():
        assert torch.allclose(tensor.float(), expected[name].float(), atol=1e-2, rtol=1e-2), name


def test_every_op_has_a_referee_and_an_unknown_one_is_told() -> None:
    assert all(groundtruth.referee(op, "cpu") for op in FAMILY)
    assert all(Sources().exact(op) == ("oracle",) for op in FAMILY)
    assert Sources().exact("conv") == ()
    with pytest.raises(LookupError, match="oracle has no op 'conv'"):
        groundtruth.referee("conv", "cpu")


def test_every_source_says_what_computes_each_of_its_ops() -> None:
    assert all(source.kernel(op) != source.name for source in SOURCES for op in source.ops)


def test_norms_of_sglang_and_flashinfer_are_one_truth() -> None:
    for op in ("rmsnorm", "fused_add_rmsnorm"):
        assert NAMED["sglang"].kernel(op) == NAMED["flashinfer"].kernel(op)
        assert NAMED["torch"].kernel(op) != NAMED["flashinfer"].kernel(op)

"""The ground-truth table, what makes a source unavailable, and the adapters against answers known by other means."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
import torch
from adapters import unchanged

import refgrid_groundtruth as groundtruth
from refgrid.dataset.case import op_of
from refgrid.dataset.definition import load_dataset
from refgrid.sources import Sources
from refgrid_groundtruth import SOURCES, Source, Unavailable, paged, selftest
from refgrid_groundtruth.table import FAMILY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

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


@pytest.mark.parametrize("source", ["torch", "transformers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_agree_with_the_formula(source: str, dtype: torch.dtype) -> None:
    torch.manual_seed(7)
    x, residual, weight = (torch.randn(5, 96).to(dtype), torch.randn(5, 96).to(dtype), torch.randn(96).to(dtype))
    fused = groundtruth.adapter(source, "fused_add_rmsnorm", "cpu")
    given = unchanged(lambda **inputs: fused(**inputs, eps=0.5), hidden_states=x, residual=residual, weight=weight)
    plain = groundtruth.adapter(source, "rmsnorm", "cpu")(given["residual_out"], weight, eps=0.5)

    total = (x.double() + residual.double()).to(dtype).double()
    expected = weight.double() * total / (total.square().mean(1, keepdim=True) + 0.5).sqrt()
    torch.testing.assert_close(given["residual_out"], total.to(dtype), rtol=0, atol=0)
    close(given["output"], expected, 1e-6 if dtype == torch.float32 else 2**-8)  # one rounding, half an ulp
    assert torch.equal(plain["output"], given["output"])


def test_gemm_multiplies_by_the_transpose_and_leaves_the_setting_as_it_was() -> None:
    torch.manual_seed(7)
    a, b = torch.randn(3, 8, dtype=torch.float16), torch.randn(5, 8, dtype=torch.float16)
    matmul = torch.backends.cuda.matmul
    matmul.allow_fp16_reduced_precision_reduction = True  # the default

    c = unchanged(groundtruth.adapter("torch", "gemm", "cpu"), A=a, B=b)["C"]

    close(c, a.double() @ b.double().T, 2e-3)
    assert matmul.allow_fp16_reduced_precision_reduction is True


def test_gemm_sums_in_float32_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = importlib.import_module("refgrid_groundtruth.torch.gemm")
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(
        module.functional, "linear", lambda *_: seen.append(matmul.allow_fp16_reduced_precision_reduction)
    )

    module.gemm(torch.ones(2, 2), torch.ones(2, 2))

    assert seen == [False]


def batch(
    qo_len: list[int], kv_len: list[int], page_size: int, dtype: torch.dtype = torch.float32, seed: int = 7
) -> dict[str, Any]:
    """Prefill inputs with 6 query heads on 2 key heads; pages shuffled, every slot that no sequence uses NaN."""
    random = torch.Generator().manual_seed(seed)
    pages = [-(-keys // page_size) for keys in kv_len]
    kv_indptr = torch.tensor([0, *pages]).cumsum(0)
    indices = torch.randperm(sum(pages) + 3, generator=random)[: sum(pages)]
    caches = [torch.full((sum(pages) + 3, page_size, 2, 16), math.nan, dtype=dtype) for _ in "kv"]
    for sequence, keys in enumerate(kv_len):
        for j in range(keys):
            slot = int(indices[kv_indptr[sequence] + j // page_size]), j % page_size
            for cache in caches:
                cache[slot] = torch.randn(2, 16, generator=random).to(dtype)
    last = [keys - (count - 1) * page_size if count else 1 for keys, count in zip(kv_len, pages, strict=True)]
    inputs = {
        "q": torch.randn(sum(qo_len), 6, 16, generator=random).to(dtype),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "qo_indptr": torch.tensor([0, *qo_len]).cumsum(0).int(),
        "kv_indptr": kv_indptr.int(),
        "kv_indices": indices.int(),
        "kv_last_page_len": torch.tensor(last, dtype=torch.int32),
        "sm_scale": 0.3,
    }
    return {name: value for name, value in inputs.items() if page_size > 1 or name != "kv_last_page_len"}


def by_hand(inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and lse in float64, one row, one head and one key at a time, straight from the definition's words."""
    q, page_size = inputs["q"].double(), inputs["k_cache"].shape[1]
    output, lse = torch.zeros_like(q), torch.full(q.shape[:2], -math.inf, dtype=torch.float64)
    kv_indptr, group = inputs["kv_indptr"].tolist(), q.shape[1] // inputs["k_cache"].shape[2]
    for sequence, (start, end) in enumerate(pairwise(inputs["qo_indptr"].tolist())):
        pages = inputs["kv_indices"][kv_indptr[sequence] : kv_indptr[sequence + 1]].tolist()
        keys = len(pages) * page_size
        if pages and "kv_last_page_len" in inputs:
            keys += int(inputs["kv_last_page_len"][sequence]) - page_size
        for row in range(start, end):
            for head in range(q.shape[1]):
                slots = [(pages[j // page_size], j % page_size, head // group) for j in range(keys - (end - 1 - row))]
                scores = [inputs["sm_scale"] * (q[row, head] @ inputs["k_cache"][slot].double()) for slot in slots]
                if slots:
                    log = torch.stack(scores).logsumexp(0)
                    lse[row, head] = log / math.log(2)
                    weights = [(score - log).exp() for score in scores]
                    values = [inputs["v_cache"][slot].double() for slot in slots]
                    output[row, head] = sum(weight * value for weight, value in zip(weights, values, strict=True))
    return output, lse


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def lse_bound(dtype: torch.dtype) -> float:
    """How near PyTorch's kernel for CPUs comes to the lse.

    In bfloat16 with AVX2 alone it is up to 7.6e-5 off here, and up to 6.2e-5 from float64 in 20 draws (torch 2.13); in
    float32, or with ATEN_CPU_CAPABILITY=default, 4e-7.
    """
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    return 2e-4 if only_avx2 and dtype == torch.bfloat16 else 1e-5


BATCHES = [
    pytest.param([1, 4, 2], [5, 4, 9], id="queries at the end"),
    pytest.param([3, 0, 2], [3, 7, 0], id="a sequence without queries, one without keys"),
    pytest.param([5, 2], [3, 0], id="more queries than keys"),
    pytest.param([2, 3], [130, 65], id="several pages of 64"),
]


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize(("qo_len", "kv_len"), BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_paged_prefill_agrees_with_the_definition(
    qo_len: list[int], kv_len: list[int], page_size: int, dtype: torch.dtype
) -> None:
    inputs = batch(qo_len, kv_len, page_size, dtype)
    output, lse = by_hand(inputs)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2

    given = unchanged(groundtruth.adapter("torch", "gqa_paged_prefill_causal", "cpu"), **inputs)

    assert given["output"].dtype == dtype
    assert given["lse"].dtype == torch.float32
    close(given["output"], output, tolerance)
    close(given["lse"], lse, lse_bound(dtype))
    eager = groundtruth.adapter("transformers", "gqa_paged_prefill_causal", "cpu")
    if all(queries <= keys for queries, keys in zip(qo_len, kv_len, strict=True) if queries):
        given = unchanged(eager, **inputs)
        assert list(given) == ["output"]
        close(given["output"], output, 3 * tolerance)
    else:
        with pytest.raises(Unavailable, match=r"unsupported: sequence .* defines nothing for a row that sees no key"):
            eager(**inputs)


@pytest.mark.parametrize("page_size", [1, 4, 64])
@pytest.mark.parametrize("kv_len", [[5, 1, 70], [3, 0, 9], [0, 0]], ids=str)
def test_paged_decode_agrees_with_the_definition(kv_len: list[int], page_size: int) -> None:
    inputs = batch([1] * len(kv_len), kv_len, page_size)
    output, lse = by_hand(inputs)
    del inputs["qo_indptr"]

    given = unchanged(groundtruth.adapter("torch", "gqa_paged_decode", "cpu"), **inputs)

    close(given["output"], output, 1e-5)
    close(given["lse"], lse, 1e-5)
    eager = groundtruth.adapter("transformers", "gqa_paged_decode", "cpu")
    if all(kv_len):
        close(unchanged(eager, **inputs)["output"], output, 1e-5)
    else:
        with pytest.raises(Unavailable, match=f"sequence {kv_len.index(0)} has 1 queries but 0 keys"):
            eager(**inputs)


def test_tiles_of_a_long_sequence_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = batch([11, 6], [9, 20], 4)
    attend = groundtruth.adapter("torch", "gqa_paged_prefill_causal", "cpu")
    whole = attend(**inputs)
    monkeypatch.setattr(paged, "TILE_ROWS", 4)

    tiled = attend(**inputs)

    close(tiled["output"], whole["output"].double(), 1e-6)
    close(tiled["lse"], whole["lse"].double(), 1e-6)


def test_the_largest_tile_comes_first_and_none_has_more_scores_than_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another order a GPU's allocator keeps what each leaves, as no later one fits in: 76 GiB at 64K keys."""
    monkeypatch.setattr(paged, "TILE_ROWS", 4)
    monkeypatch.setattr(paged, "SCORES", 3 * 20 * 2)
    q, k, v = torch.zeros(17, 3, 8), torch.zeros(29, 1, 8), torch.zeros(29, 1, 8)

    found = list(paged.tiles(q, k, v, torch.tensor([0, 11, 17]), torch.tensor([9, 20])))

    held = [tile.mask.numel() for tile in found]
    assert held == sorted(held, reverse=True)
    assert [len(tile.k) for tile in found] == [20, 18, 16, 9, 6, 2]
    assert max(held) * 3 <= 3 * 20 * 2
    assert sorted(row for tile in found for row in range(tile.rows.start, tile.rows.stop)) == list(range(17))


def test_only_rows_without_keys_get_minus_infinity() -> None:
    """An lse of exactly 0 is the CPU operator's mark of such a row, and a value like any other elsewhere."""
    inputs = batch([1, 1], [1, 0], 1)
    inputs["q"] = torch.zeros_like(inputs["q"])
    del inputs["qo_indptr"]

    lse = groundtruth.adapter("torch", "gqa_paged_decode", "cpu")(**inputs)["lse"]

    assert lse[0].tolist() == [0.0] * 6
    assert lse[1].tolist() == [-math.inf] * 6


# ---- FlashInfer's adapters, on a double that takes what the library takes and answers through PyTorch


class Wrapper:
    """Either paged wrapper; `called` holds what the last plan and run got."""

    called: ClassVar[dict[str, Any]] = {}
    minus_infinity = -5e4  # what FlashInfer writes up to 0.6
    planned = ("indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size")

    def __init__(self, workspace: torch.Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        self.called.clear()
        self.called.update(workspace=workspace, kv_layout=kv_layout, **options)

    def plan(self, *args: Any, **options: Any) -> None:
        names = self.planned if len(args) == len(self.planned) else ("qo_indptr", *self.planned)
        self.called.update(dict(zip(names, args, strict=True)), **options)

    def run(self, q: torch.Tensor, caches: tuple[torch.Tensor, torch.Tensor], *, return_lse: bool) -> Any:
        assert return_lse
        called = self.called
        truth = importlib.import_module("refgrid_groundtruth.torch.gqa")
        rows = torch.arange(len(q) + 1, dtype=torch.int32)
        given = truth.gqa_paged_prefill_causal(
            q, *caches, called.get("qo_indptr", rows), called["indptr"], called["indices"], called["last_page_len"],
            sm_scale=called["sm_scale"],
        )  # fmt: skip
        return given["output"], given["lse"].clamp(min=self.minus_infinity)


def _rmsnorm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def _fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> None:
    residual += x
    x.copy_(_rmsnorm(residual, weight, eps))


@pytest.fixture
def flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The adapters' module over the double, installed as FlashInfer 0.6.12 and served on the CPU."""
    package, info = tmp_path / "flashinfer", tmp_path / "flashinfer_python-0.6.12.dist-info"
    for folder in (package, info):
        folder.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flashinfer-python\nVersion: 0.6.12\n")
    for name in ("__init__", "norm", "decode", "prefill"):
        (package / f"{name}.py").touch()
    names = ["flashinfer", "flashinfer.norm", "flashinfer.decode", "flashinfer.prefill"]
    names += [f"refgrid_groundtruth.flashinfer.{family}" for family in ("norm", "gqa")]
    held = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    monkeypatch.syspath_prepend(str(tmp_path))
    norm, decode, prefill = (importlib.import_module(name) for name in names[1:4])
    vars(norm).update(rmsnorm=_rmsnorm, fused_add_rmsnorm=_fused_add_rmsnorm)
    vars(decode).update(BatchDecodeWithPagedKVCacheWrapper=Wrapper)
    vars(prefill).update(BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    here = [dataclasses.replace(source, devices=("cpu",)) for source in SOURCES if source.library == "flashinfer"]
    monkeypatch.setattr(groundtruth, "SOURCES", tuple(here))
    module = importlib.import_module("refgrid_groundtruth.flashinfer.gqa")
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1024)
    yield module
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(held)


DOUBLED = ("norm", "gqa")
PAGED = [(s.name, op) for s, op in ALL if s.library == "flashinfer" and FAMILY[op] in DOUBLED and "ragged" not in op]


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(("source", "op"), PAGED)
def test_flashinfer_passes_its_self_test_through_the_double(source: str, op: str) -> None:
    assert callable(groundtruth.adapter(source, op, "cpu"))


@pytest.mark.usefixtures("flashinfer")
def test_flashinfer_norms_work_on_copies() -> None:
    norm = importlib.import_module("refgrid_groundtruth.flashinfer.norm")
    x, residual, weight = torch.ones(2, 8), torch.full((2, 8), 2.0), torch.full((8,), 4.0)

    given = unchanged(
        lambda **inputs: norm.fused_add_rmsnorm(**inputs, eps=7.0),
        hidden_states=x,
        residual=residual,
        weight=weight,
    )

    assert given["output"].tolist() == [[3.0] * 8] * 2
    assert given["residual_out"].tolist() == [[3.0] * 8] * 2
    assert norm.rmsnorm(given["residual_out"], weight, eps=7.0)["output"].tolist() == [[3.0] * 8] * 2


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize(
    ("source", "op", "options"),
    [
        ("flashinfer", "gqa_paged_decode", {"use_tensor_cores": False, "backend": "fa2"}),
        ("flashinfer-fa2", "gqa_paged_decode", {"use_tensor_cores": True, "backend": "fa2"}),
        ("flashinfer-fa2", "gqa_paged_prefill_causal", {"backend": "fa2", "causal": True}),
        ("flashinfer-fa3", "gqa_paged_prefill_causal", {"backend": "fa3", "causal": True}),
    ],
)
def test_flashinfer_gets_the_plan_it_wants(source: str, op: str, options: dict[str, Any], page_size: int) -> None:
    inputs = batch([1, 1, 1], [5, 0, 2], page_size, torch.bfloat16)
    output, lse = by_hand(inputs)
    if op == "gqa_paged_decode":
        del inputs["qo_indptr"]
    adapter = groundtruth.adapter(source, op, "cpu")

    given = unchanged(adapter, **inputs)

    called = Wrapper.called
    assert {name: called[name] for name in options} == options
    assert (called["kv_layout"], called["q_data_type"], called["kv_data_type"]) == (
        "NHD",
        torch.bfloat16,
        torch.bfloat16,
    )
    assert [called[name] for name in Wrapper.planned[3:]] == [6, 2, 16, page_size]
    assert called["last_page_len"].tolist() == [1, 0, 1 if page_size == 1 else 2], "0 where a sequence is empty"
    assert called["last_page_len"].dtype == torch.int32
    assert called["indptr"] is inputs["kv_indptr"]
    assert called["indices"] is inputs["kv_indices"]
    close(given["output"], output, 1e-2)
    close(given["lse"], lse, 1e-5)  # -inf again where the library says -5e4
    workspace = called["workspace"]
    adapter(**inputs)
    assert Wrapper.called["workspace"] is workspace, "allocated once"


def test_flashinfers_stand_in_for_infinity_is_translated_in_rows_without_keys_only(flashinfer: ModuleType) -> None:
    lse = torch.tensor([[-5e4 + 3], [-5e4 + 3], [-math.inf], [1.0]])

    translated = flashinfer.with_infinity(lse, torch.tensor([True, False, True, True]))

    assert translated.flatten().tolist() == [-math.inf, -5e4 + 3, -math.inf, 1.0]


@pytest.mark.usefixtures("flashinfer")
def test_fa3_declines_rows_without_keys_but_takes_an_empty_sequence() -> None:
    fa3 = groundtruth.adapter("flashinfer-fa3", "gqa_paged_prefill_causal", "cpu")

    assert fa3(**batch([2, 3], [4, 0], 4))["lse"][2:].tolist() == [[-math.inf] * 6] * 3
    with pytest.raises(Unavailable, match="unsupported: sequence 1 has 3 queries but 2 keys: fa3 defines nothing"):
        fa3(**batch([2, 3], [4, 2], 4))


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        pytest.param(RuntimeError("Unsupported group_size: 6"), Unavailable, id="a refusal in words"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access"), RuntimeError, id="a fault stays one"),
    ],
)
def test_what_flashinfer_refuses_is_unsupported(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    decode = groundtruth.adapter("flashinfer", "gqa_paged_decode", "cpu")

    def refuse(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(Wrapper, "plan", refuse)
    inputs = batch([1], [3], 4)
    del inputs["qo_indptr"]

    with pytest.raises(expected, match=str(raised)):
        decode(**inputs)


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

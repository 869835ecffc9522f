"""Sources of sampling: laws against exact fractions, adapters against small doubles of the libraries, self-tests."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import naive_sampling as naive
import pytest
import torch

import refgrid_groundtruth as groundtruth
from refgrid.dataset.definition import InputSpec, Workload, load_dataset
from refgrid.proving.draws import compare_draws
from refgrid.proving.inputs import make_inputs
from refgrid.proving.tolerance import EXACT
from refgrid_groundtruth import Unavailable, selftest
from refgrid_groundtruth.table import FAMILIES

Tensor: TypeAlias = torch.Tensor
OPS = FAMILIES["sampling"]
TOP_K, TOP_P, BOTH = OPS
DATASET = load_dataset(Path(__file__).parents[1])

# No tie at any cut below, and one row of zeros beyond its tokens.
PLAIN = torch.tensor(
    [[0.40, 0.25, 0.15, 0.10, 0.07, 0.03], [0.05, 0.10, 0.60, 0.20, 0.04, 0.01], [0, 0.75, 0, 0.25, 0, 0]]
)
TIED = torch.tensor([[0.125, 0.25, 0.25, 0.25, 0.125, 0.0]])


def adapter(library: str, op: str) -> Callable[..., dict[str, Tensor]]:
    found: Callable[..., dict[str, Tensor]] = getattr(
        importlib.import_module(f"refgrid_groundtruth.{library}.sampling"), op
    )
    return found


def given(op: str, probs: Tensor, k: int, p: float) -> dict[str, Tensor]:
    filters = {"top_k": torch.full((len(probs),), k, dtype=torch.int32), "top_p": torch.full((len(probs),), p)}
    return {"probs": probs, **{name: value for name, value in filters.items() if name in op}}


def exact(inputs: dict[str, Tensor]) -> Tensor:
    return naive.law(inputs["probs"], inputs.get("top_k"), inputs.get("top_p"))


# ---- laws


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3, 6, 9])
@pytest.mark.parametrize("p", [-1.0, 0.0, 1e-6, 0.3, 0.5, 0.7, 0.97, 1.0, 2.0])
def test_the_oracle_is_the_definition(op: str, k: int, p: float) -> None:
    for probs in (PLAIN, TIED, torch.cat([PLAIN, TIED])):
        inputs = given(op, probs, k, p)
        law = adapter("oracle", op)(**inputs)["samples"]

        assert law.dtype == torch.float64
        torch.testing.assert_close(law, exact(inputs), rtol=1e-13, atol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3, 6, 9])
@pytest.mark.parametrize("p", [0.0, 1e-6, 0.3, 0.5, 0.7, 0.97, 1.0, 2.0])
def test_the_warpers_of_transformers_are_the_definition(op: str, k: int, p: float) -> None:
    inputs = given(op, PLAIN, k, p)
    law = adapter("transformers", op)(**inputs)["samples"]

    assert law.dtype == torch.float32
    torch.testing.assert_close(law.double(), exact(inputs), rtol=1e-6, atol=0)


def test_the_warper_of_top_k_keeps_ties_and_that_of_top_p_is_refused_them() -> None:
    inputs = given(TOP_K, TIED, 2, 1.0)
    torch.testing.assert_close(adapter("transformers", TOP_K)(**inputs)["samples"].double(), exact(inputs))

    with pytest.raises(Unavailable, match="unsupported: row 0 is cut through tied tokens, of which the warper keeps"):
        adapter("transformers", TOP_P)(**given(TOP_P, TIED, 0, 0.4))
    with pytest.raises(Unavailable, match="unsupported: TopPLogitsWarper refuses a top_p of -1"):
        adapter("transformers", BOTH)(**given(BOTH, PLAIN, 2, -1.0))


def test_the_warpers_refuse_the_row_that_is_cut_through_ties_among_rows_of_its_filter() -> None:
    inputs = given(TOP_P, torch.cat([PLAIN[:1], PLAIN[:1], TIED]), 0, 0.4)
    inputs["top_p"][0] = 1.0  # of another filter: the tied row is the second of its own

    with pytest.raises(Unavailable, match="unsupported: row 2 is cut through tied tokens"):
        adapter("transformers", TOP_P)(**inputs)


def test_rows_of_one_filter_have_the_law_that_each_has_alone() -> None:
    probs = torch.rand(6, 50, generator=torch.Generator().manual_seed(3)).softmax(dim=-1)
    k, p = torch.tensor([3, 0, 3, 7, 0, 3]).int(), torch.tensor([0.5, 0.9, 0.5, 1.0, 0.9, 0.8])
    law = adapter("transformers", BOTH)

    together = law(probs=probs, top_k=k, top_p=p)["samples"]

    alone = [
        law(probs=probs[row : row + 1], top_k=k[row : row + 1], top_p=p[row : row + 1])["samples"] for row in range(6)
    ]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_laws_agree_on_what_is_drawn_for_cases(op: str, batch_size: int) -> None:
    definition = DATASET.definitions[f"{op}_v128256"]
    specs = {name: InputSpec("random") for name in definition.inputs}
    inputs: Any = make_inputs(definition, Workload("w", {"batch_size": batch_size}, specs), 0, "cpu", None).tensors
    oracle, warped = (adapter(library, op)(**inputs)["samples"] for library in ("oracle", "transformers"))

    assert torch.equal(oracle > 0, warped > 0)
    torch.testing.assert_close(warped.double(), oracle, rtol=1e-3, atol=0)
    torch.testing.assert_close(oracle.sum(dim=1), torch.ones(batch_size, dtype=torch.float64))


@pytest.mark.parametrize("library", ["oracle", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_no_row_has_a_law_of_no_row(library: str, op: str) -> None:
    assert adapter(library, op)(**given(op, torch.empty(0, 5), 1, 0.5))["samples"].shape == (0, 5)


@pytest.mark.parametrize("library", ["oracle", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone(library: str, op: str) -> None:
    inputs = given(op, PLAIN.clone(), 2, 0.5)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    adapter(library, op)(**inputs)

    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


# ---- FlashInfer, by a double


def drawn_by_flashinfer(probs: Tensor, top_k: Tensor | None, top_p: Tensor | None) -> Tensor:
    """Reject draws until one has fewer than top_k, and mass of less than top_p, above it; never for 0."""
    assert top_k is None or (top_k.dtype == torch.int32 and top_k.min() > 0)
    assert top_p is None or (top_p.dtype == torch.float32 and top_p.min() > 0)
    law = naive.law(probs, top_k, top_p)
    return torch.multinomial(law, 1)[:, 0].int()


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    package, module = ModuleType("flashinfer"), ModuleType("flashinfer.sampling")
    package.__path__ = []
    package.sampling = module  # type: ignore[attr-defined]

    def top_k(probs: Tensor, top_k: Tensor, *, deterministic: bool) -> Tensor:
        assert deterministic
        return drawn_by_flashinfer(probs, top_k, None)

    def top_p(probs: Tensor, top_p: Tensor, *, deterministic: bool) -> Tensor:
        assert deterministic
        return drawn_by_flashinfer(probs, None, top_p)

    def both(probs: Tensor, top_k: Tensor, top_p: Tensor, *, filter_apply_order: str, deterministic: bool) -> Tensor:
        assert deterministic
        assert filter_apply_order == "top_k_first"
        return drawn_by_flashinfer(probs, top_k, top_p)

    for op, function in ((TOP_K, top_k), (TOP_P, top_p), (BOTH, both)):
        setattr(module, op, function)
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)
    yield module
    sys.modules.pop("refgrid_groundtruth.flashinfer.sampling", None)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("k", "p"), [(2, 0.5), (0, 1.0), (-1, 1e-6), (99, 0.7)])
def test_flashinfer_gets_what_it_understands(flashinfer: ModuleType, op: str, k: int, p: float) -> None:
    del flashinfer
    times = 300
    inputs = given(op, torch.cat([PLAIN, TIED]).repeat(times, 1), k, p)
    torch.manual_seed(0)
    samples = adapter("flashinfer", op)(**inputs)["samples"]

    assert samples.dtype == torch.int64
    law = exact({name: tensor[:4] for name, tensor in inputs.items()})
    assert compare_draws("samples", samples.view(times, 4), law, EXACT).matches


@pytest.mark.parametrize("op", [TOP_P, BOTH])
def test_flashinfer_is_refused_a_top_p_that_it_never_accepts(flashinfer: ModuleType, op: str) -> None:
    del flashinfer
    with pytest.raises(Unavailable, match="unsupported: a top_p of 0 rejects every token"):
        adapter("flashinfer", op)(**given(op, PLAIN, 2, 0.0))


# ---- SGLang, by a double


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    names = ("sglang", "sglang.srt", "sglang.srt.layers", "sglang.srt.layers.sampler")
    modules = [ModuleType(name) for name in names]
    for outer, inner in pairwise(modules):
        outer.__path__ = []
        setattr(outer, inner.__name__.rpartition(".")[2], inner)

    def sample(
        probs: Tensor,
        top_ks: Tensor,
        top_ps: Tensor,
        min_ps: Tensor,
        need_min_p_sampling: bool,
        sampling_seed: None,
        positions: None,
    ) -> Tensor:
        """The first top_k places of the falling order whose mass before them is at most top_p."""
        assert (need_min_p_sampling, sampling_seed, positions) == (False, None, None)
        assert min_ps.shape == top_ps.shape == top_ks.shape
        values, tokens = probs.sort(dim=1, descending=True)
        kept = (torch.arange(probs.shape[1]) < top_ks[:, None]) & (values.cumsum(1) - values <= top_ps[:, None])
        return tokens.int().gather(1, torch.multinomial(values * kept, 1))[:, 0]

    modules[-1].top_k_top_p_min_p_sampling_from_probs_torch = sample  # type: ignore[attr-defined]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    yield modules[-1]
    sys.modules.pop("refgrid_groundtruth.sglang.sampling", None)


@pytest.mark.parametrize("op", [TOP_K, TOP_P])
@pytest.mark.parametrize(("k", "p"), [(2, 0.5), (0, 1.0), (-1, 1e-6), (99, 0.7), (1, 0.0)])
def test_sglang_gets_what_it_understands(sglang: ModuleType, op: str, k: int, p: float) -> None:
    del sglang
    times = 300
    inputs = given(op, PLAIN.repeat(times, 1), k, p)
    torch.manual_seed(0)
    samples = adapter("sglang", op)(**inputs)["samples"]

    assert samples.dtype == torch.int64
    law = exact({name: tensor[:3] for name, tensor in inputs.items()})
    assert compare_draws("samples", samples.view(times, 3), law, EXACT).matches


def test_sglang_is_refused_ties_at_the_cut_and_no_others(sglang: ModuleType) -> None:
    del sglang
    both = torch.cat([PLAIN[:1], TIED])
    for op, k, p in ((TOP_K, 2, 1.0), (TOP_P, 0, 0.4)):
        with pytest.raises(Unavailable, match="unsupported: row 1 is cut through tied tokens"):
            adapter("sglang", op)(**given(op, both, k, p))
    for op, k, p in ((TOP_K, 3, 1.0), (TOP_K, 0, 1.0), (TOP_K, 5, 1.0), (TOP_P, 0, 0.7), (TOP_P, 0, 1.0)):
        adapter("sglang", op)(**given(op, both, k, p))
    with pytest.raises(Unavailable, match="unsupported: a top_p of -1 leaves no token"):
        adapter("sglang", TOP_P)(**given(TOP_P, PLAIN, 0, -1.0))


# ---- self-tests


@pytest.mark.parametrize("op", OPS)
def test_answers_are_certain(op: str) -> None:
    inputs, expected = selftest.answer(op)
    law = naive.law(inputs["probs"], inputs.get("top_k"), inputs.get("top_p"))

    assert torch.equal(law.gather(1, expected["samples"][:, None]), torch.ones(len(law), 1, dtype=torch.float64))


@pytest.mark.parametrize("source", ["oracle", "transformers"])
@pytest.mark.parametrize("op", OPS)
def test_sources_that_run_anywhere_pass_their_self_test(source: str, op: str) -> None:
    groundtruth.adapter(source, op, "cpu")  # raises otherwise


def doubled(inputs: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {**inputs, name: inputs[name] * 2} if name in inputs else inputs


@pytest.mark.parametrize(
    ("op", "spoil"),
    [
        pytest.param(TOP_K, lambda x: doubled(x, "top_k"), id="a token too many"),
        pytest.param(TOP_P, lambda x: doubled(x, "top_p"), id="another nucleus"),
        pytest.param(BOTH, lambda x: doubled(x, "top_k"), id="a token too many of both"),
        pytest.param(BOTH, lambda x: doubled(x, "top_p"), id="another nucleus of both"),
        pytest.param(TOP_K, lambda x: {**x, "probs": x["probs"].roll(1, 1)}, id="the next token"),
        pytest.param(TOP_P, lambda x: {**x, "probs": x["probs"].roll(1, 0)}, id="the next row"),
    ],
)
@pytest.mark.parametrize("source", ["oracle", "transformers"])
def test_the_self_test_notices(
    monkeypatch: pytest.MonkeyPatch, source: str, op: str, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    right = adapter(source, op)
    module = importlib.import_module(f"refgrid_groundtruth.{source}.sampling")
    monkeypatch.setattr(module, op, lambda **inputs: right(**spoil(inputs)))

    with pytest.raises(Unavailable, match=r"error: self-test failed: got samples\[\d+, \d+\] = \S+ but should be"):
        groundtruth.adapter(source, op, "cpu")


def test_the_self_test_of_both_notices_a_nucleus_of_the_mass_before_top_k(flashinfer: ModuleType) -> None:
    def joint(probs: Tensor, top_k: Tensor, top_p: Tensor, **_: Any) -> Tensor:
        law = naive.law(probs, top_k, None) * (naive.law(probs, None, top_p) > 0)
        return torch.multinomial(law, 1)[:, 0].int()

    flashinfer.top_k_top_p_sampling_from_probs = joint  # type: ignore[attr-defined]
    torch.manual_seed(0)

    with pytest.raises(Unavailable, match=r"self-test failed: got samples\[\d+\] = \d+ but should be \d+"):
        selftest.run(adapter("flashinfer", BOTH), BOTH, "cpu")


@pytest.mark.parametrize("op", OPS)
def test_doubles_pass_the_self_test_as_the_libraries_should(
    flashinfer: ModuleType, sglang: ModuleType, op: str
) -> None:
    del flashinfer, sglang
    for library in ("flashinfer", "sglang"):
        if not (library == "sglang" and op == BOTH):
            selftest.run(adapter(library, op), op, "cpu")

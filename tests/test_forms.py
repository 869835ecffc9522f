"""Random outputs are drawn many times and held against a law or another sampler, through the whole way of a case."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.proving import forms
from refgrid.proving.finding import Finding
from refgrid.proving.proof import Prover
from refgrid.proving.tolerance import EXACT, Tolerance
from refgrid.records.record import Verdict
from refgrid.sources import Sources

OP = "dice_sampling_from_probs"
REFERENCE = "import torch\n\ndef run(probs):\n    return torch.multinomial(probs, 1)[:, 0]\n"
Truth = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def dice(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Path:
    """A data set of one definition: a token of each of three rows of eight outcomes."""
    (spec,) = double["inputs"].values()
    double |= {"name": "double_n4", "inputs": {"probs": spec}, "reference": REFERENCE}
    double["axes"]["n"]["value"] = 8
    double["outputs"] = {"samples": {"shape": ["batch_size"], "dtype": "int64"}}
    file = write_definition(double, 3)
    workloads = tmp_path / "workloads/double/double_n4.jsonl"
    workloads.write_text(workloads.read_text().replace('"x"', '"probs"'))
    assert file.exists()
    return tmp_path


@pytest.fixture
def proves(dice: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Proves one check of the dice against truths, each a function of the probabilities; op and inputs are made so."""
    from refgrid.proving import workbench as proof
    from refgrid.proving.inputs import Inputs

    probs = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 0], [0, 0, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    fixed = Inputs({"probs": probs / probs.sum(1, keepdim=True)}, "fixed")
    monkeypatch.setattr(proof, "make_inputs", lambda *_: fixed)
    monkeypatch.setattr("refgrid.proving.draws._ELEMENTS", {"cpu": 2**21})

    def run(check: Any = "numerics", source: str | None = None, reference: str | None = None, **truths: Truth) -> Any:
        if reference is not None:
            file = dice / "definitions/double/double_n4.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), "reference": reference}))

        def adapter(name: str, _op: str, _device: str) -> Callable[..., Mapping[str, torch.Tensor]]:
            return lambda probs: {"samples": truths[name](probs)}

        table = tuple(SimpleNamespace(name=name, ops=(OP,)) for name in truths)
        prover = Prover(load_dataset(dice), Sources((SimpleNamespace(SOURCES=table, adapter=adapter),)), "cpu")
        source = source or (next(iter(truths)) if check == "numerics" else None)
        return prover.prove(Case("double_n4", "double", OP, "b3", check, source))

    return run


def law(probs: torch.Tensor) -> torch.Tensor:
    return probs.double()


def kernel(probs: torch.Tensor) -> torch.Tensor:
    return (probs / torch.empty_like(probs).exponential_()).argmax(1)


@pytest.mark.parametrize("truth", [law, kernel])
def test_a_right_sampler_matches_a_law_and_another_kernel(proves: Any, truth: Truth) -> None:
    (comparison,) = proves(truth=truth).comparisons

    assert comparison.count > 10_000


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda probs: law(probs).flip(1), id="law of others"),
        pytest.param(lambda probs: law(probs.pow(0.9) / probs.pow(0.9).sum(1, keepdim=True)), id="law of 0.9"),
        pytest.param(lambda probs: kernel(probs.pow(0.9)), id="kernel of 0.9"),
        pytest.param(lambda probs: kernel(probs).clamp(min=1), id="kernel without a token"),
        pytest.param(lambda probs: probs.argmax(1), id="kernel that takes the likeliest"),
    ],
)
def test_a_wrong_law_and_a_wrong_kernel_are_mismatches(proves: Any, wrong: Truth) -> None:
    with pytest.raises(Finding) as caught:
        proves(truth=wrong)

    assert caught.value.verdict is Verdict.MISMATCH
    assert "samples" in caught.value.reason


def test_sources_agree_whether_they_give_laws_or_tokens(proves: Any) -> None:
    proves("agreement", one=law, two=kernel, three=law)
    with pytest.raises(Finding, match="three against one"):
        proves("agreement", one=law, two=kernel, three=lambda probs: law(probs).flip(1))
    with pytest.raises(Finding, match="two against one"):
        proves("agreement", one=law, two=lambda probs: kernel(probs.pow(0.8)))


def test_a_kernel_is_held_to_a_law_though_another_kernel_comes_first(proves: Any) -> None:
    """One draw in 10,000 that is impossible is no matter between two kernels; a law knows it."""

    def slips(probs: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(len(probs)) < 1e-4, 7, kernel(probs))

    proves("agreement", one=kernel, two=slips)
    with pytest.raises(Finding, match=r"samples is token 7 in .* but should be in 0 .* slips against"):
        proves("agreement", one=kernel, slips=slips, law=law)


@pytest.mark.parametrize("rare", [1e-9, 1e-7])
def test_two_laws_that_allow_different_tokens_differ_however_rare(rare: float) -> None:
    """Less than the table's atol; a filter that drops the tail of a vocabulary drops such tokens."""
    full = torch.tensor([[0.5, 0.5 - rare, rare]], dtype=torch.float64)
    cut = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    near = torch.tensor([[0.5, 0.5, rare * 1.01]], dtype=torch.float64)
    table = Tolerance(1e-5, 1e-5)

    for actual, expected in ((full, cut), (cut, full), (near, full)):
        found = forms.compare_in_form(OP, "samples", actual, expected, table)
        assert not found.matches
        assert found.worst[0].index == (0, 2)
    assert forms.compare_in_form(OP, "samples", full, full * (1 + 1e-6), table).matches


def test_two_laws_are_held_to_the_table_besides() -> None:
    """A thousandth of a likely token is within what a law can be computed to, but not within the table."""
    one, two = torch.tensor([[0.6, 0.4]]), torch.tensor([[0.6003, 0.3997]])

    assert not forms.compare_in_form(OP, "samples", one, two, Tolerance(1e-5, 1e-5)).matches


def test_the_same_seed_gives_the_same_tokens_and_a_wild_one_is_noticed(proves: Any, dice: Path) -> None:
    proves("determinism", truth=law)

    file = dice / "definitions/double/double_n4.json"
    wild = "torch.multinomial(probs, 1, generator=G)[:, 0]"
    text = file.read_text().replace("torch.multinomial(probs, 1)[:, 0]", wild)
    file.write_text(text.replace("def run(probs)", "G = torch.Generator()\\n\\ndef run(probs)"))
    with pytest.raises(Finding, match="samples differs between two runs"):
        proves("determinism", truth=law)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (lambda probs: torch.zeros(len(probs) + 1, dtype=torch.int64), r"samples.shape = \[4\], but should be \[3\]"),
        (lambda probs: torch.zeros(len(probs), dtype=torch.int32), "samples.dtype = int32, but should be int64"),
        (lambda probs: probs[:2], r"law of samples is \[2, 8\], but should be \[3, outcomes\]"),
    ],
)
def test_tokens_of_another_form_are_errors(proves: Any, given: Truth, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        proves(truth=given)


def test_what_a_sampler_gives_at_the_own_size_is_looked_at(proves: Any) -> None:
    """Kernels choose their way by the number of rows, and most draws are taken for many rows at once."""

    def of_few(probs: torch.Tensor) -> torch.Tensor:
        return kernel(probs) if len(probs) > 3 else torch.tensor([7, *kernel(probs)[1:]])

    with pytest.raises(Finding, match=r"samples is token 7 in .* but should be in 0"):
        proves("agreement", law=law, of_few=of_few)
    sound = REFERENCE.removesuffix("\n").replace("return", "tokens =")
    broken = f"{sound}\n    if len(tokens) == 3:\n        tokens[0] = 7\n    return tokens\n"
    with pytest.raises(Finding, match=r"samples is token 7 in .* but should be in 0"):
        proves(law=law, reference=broken)


def test_a_sampler_that_obeys_no_seed_is_an_error_though_its_tokens_fit_the_law(proves: Any) -> None:
    def deaf(probs: torch.Tensor) -> torch.Tensor:
        own = torch.Generator().manual_seed(5)
        return torch.multinomial(probs, 1, generator=own)[:, 0]

    with pytest.raises(Finding) as caught:
        proves(deaf=deaf)

    assert caught.value.verdict is Verdict.ERROR
    assert caught.value.reason.startswith(
        "deaf: samples of 3 of 3 rows are the same under 8 seeds, which a sampler that obeys them gives with "
    )


@pytest.mark.parametrize(
    ("rows", "alike"),
    [
        pytest.param([[1.0, 0.0]] * 100, False, id="one token each, always the same"),
        pytest.param([[0.5, 0.5]] * 3, False, id="too few to tell"),
        pytest.param([[0.5, 0.5]] * 10, True, id="ten coins"),
        pytest.param([[0.999, 0.001]] * 3, False, id="nearly always the same"),
    ],
)
def test_equal_draws_are_an_error_only_where_chance_gives_none(rows: list[list[float]], alike: bool) -> None:
    law = torch.tensor(rows)
    torch.manual_seed(0)
    draws = torch.stack([torch.multinomial(law, 1)[:, 0] for _ in range(200)])

    forms.demand_seeded("kernel", "samples", draws)
    draws[: forms.OWN] = draws[0].clone()

    if alike:
        with pytest.raises(Finding, match=r"kernel: samples of \d+ of \d+ rows are the same under 8 seeds"):
            forms.demand_seeded("kernel", "samples", draws)
    else:
        forms.demand_seeded("kernel", "samples", draws)


def test_one_row_that_obeys_no_seed_among_others_that_do_is_an_error() -> None:
    torch.manual_seed(0)
    draws = torch.randint(100, (200, 3))
    forms.demand_seeded("kernel", "samples", draws)
    draws[: forms.OWN, 1] = 5

    with pytest.raises(Finding, match="kernel: samples of 1 of 3 rows are the same under 8 seeds"):
        forms.demand_seeded("kernel", "samples", draws)


@pytest.mark.parametrize(
    ("rows", "draws", "deaf"),
    [
        pytest.param(16, 16, 15, id="all but one, of many outcomes"),
        pytest.param(256, 16, 8, id="few of many"),
        pytest.param(1, 64, 1, id="the only one"),
    ],
)
def test_rows_that_obey_no_seed_are_an_error_though_the_draws_are_few(rows: int, draws: int, deaf: int) -> None:
    torch.manual_seed(0)
    given = torch.randint(10**6, (draws, rows))
    forms.demand_seeded("kernel", "samples", given)
    given[: forms.OWN, :deaf] = given[0, :deaf].clone()

    with pytest.raises(Finding, match=f"kernel: samples of {deaf} of {rows} rows are the same under 8 seeds"):
        forms.demand_seeded("kernel", "samples", given)


@pytest.mark.parametrize(("rows", "draws"), [(1, 64), (2, 32), (7, 149), (16, 65), (256, 16)])
def test_a_right_sampler_is_blamed_less_than_once_in_a_billion_whatever_its_law(rows: int, draws: int) -> None:
    """Worst of all laws is one likely token among others that never come twice: counted over how often it comes.

    That other rows than the first are alike as well is left out, but any of them may be the one that is.
    """
    worst = 0.0
    for p in torch.linspace(0.02, 0.98, 49).tolist():
        blamed = 0.0
        for times in range(draws - forms.OWN + 1):
            given = torch.arange(draws * rows).reshape(draws, rows)
            given[: forms.OWN, 0] = given[0, 0].clone()
            given[forms.OWN : forms.OWN + times, 0] = given[0, 0]
            try:
                forms.demand_seeded("kernel", "samples", given)
            except Finding:
                left = draws - forms.OWN - times
                blamed += math.comb(draws - forms.OWN, times) * p ** (forms.OWN + times) * (1 - p) ** left
        worst = max(worst, blamed)

    assert rows * worst < 1e-9


def test_samples_in_memory_of_earlier_ones_are_an_error(proves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call overwrites what the last gave, so that the draws held against the law are fewer than they seem."""
    monkeypatch.setattr(forms, "_ELEMENTS_A_CALL", {"cpu": 2**18})
    kept: dict[int, torch.Tensor] = {}

    def of(least: int) -> Truth:
        def static(probs: torch.Tensor) -> torch.Tensor:
            tokens = kernel(probs)
            return kept.setdefault(len(tokens), tokens).copy_(tokens) if len(tokens) >= least else tokens

        return static

    for least, first in ((0, 1), (4, 9)):
        kept.clear()
        with pytest.raises(Finding, match=f"static: samples lies in memory that call {first} of static gave before"):
            proves(static=of(least))


def test_draws_are_taken_in_calls_of_bounded_size(dice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "_ELEMENTS_A_CALL", {"cpu": 100})
    definition = load_dataset(dice).definitions["double_n4"]
    sizes = []

    def call(inputs: Mapping[str, Any]) -> Mapping[str, torch.Tensor]:
        sizes.append(len(inputs["probs"]))
        return {"samples": torch.rand(len(inputs["probs"]))}

    probs = torch.full((3, 8), 1 / 8)
    monkeypatch.setattr(forms, "draws_for", lambda *_: 18)
    first, again, other = (forms.draw(call, {"probs": probs}, definition, "samples", name) for name in "aab")

    assert first.shape == (18, 3)
    assert sizes[:11] == [3] * forms.OWN + [12, 12, 6]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 54, "each call draws other numbers"


def test_an_output_without_a_form_is_compared_element_by_element() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])

    assert forms.form_of("gemm", "C") is None
    assert not forms.compare_in_form("gemm", "C", one, two, EXACT).matches
    assert forms.compare_in_form("gemm", "C", one, two, Tolerance(0.5, 0)).matches

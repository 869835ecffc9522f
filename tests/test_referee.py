"""Where two disagree, float64 settles who is off: the verdict stays, the reason tells; and one kernel is one truth."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from refgrid.dataset.case import Case
from refgrid.dataset.definition import load_dataset
from refgrid.proving.finding import Finding
from refgrid.proving.proof import Proof, Prover
from refgrid.proving.referee import hold, settle, told_further
from refgrid.proving.tolerance import Tolerance
from refgrid.records.record import Verdict
from refgrid.sources import Sources

Truth = Callable[[torch.Tensor], torch.Tensor]


def exactly(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def off_by(error: float) -> Truth:
    return lambda x: x * 2 + error


class Bench:
    """Proves checks of `double` against fake sources, each a function of x with the name of its kernel."""

    def __init__(self, root: Path, reference: str = "return x * 2") -> None:
        file = root / "definitions/double/double_n4.json"
        file.write_text(file.read_text().replace("return x * 2", reference))
        self._dataset = load_dataset(root)
        self.referee: Any = lambda x: {"y": x * 2}
        self.exact = ""  # the source that is the referee
        self.size: Any = "small"
        self.workload = "b1"
        self.kernels: Mapping[str, str] = {}
        self.hashes: Mapping[str, str] = {}
        self.outliers: frozenset[str] = frozenset()
        self.report = ""

    def prove(self, check: Any, source: str | None = None, **truths: Truth) -> Proof:
        def adapter(name: str, _op: str, _device: str) -> Any:
            return lambda x: {"y": truths[name](x)}

        def judging(_op: str, _device: str) -> Any:
            if self.referee is None:
                raise LookupError("no formula")
            return self.referee

        table = [SimpleNamespace(name=name, ops=("double",), kernel=self._kernel(name)) for name in truths]
        provider = SimpleNamespace(SOURCES=tuple(table), adapter=adapter, referee=judging, REFEREE=self.exact)
        prover = Prover(self._dataset, Sources((provider,)), "cpu")
        try:
            return prover.prove(Case("double_n4", "double", "double", self.workload, check, source, self.size))
        finally:
            self.hashes = prover.hashes

    def _kernel(self, name: str) -> Callable[[str], str]:
        return lambda _op: self.kernels.get(name, name)

    def refuted(self, check: Any, source: str | None = None, **truths: Truth) -> str:
        with pytest.raises(Finding) as caught:
            self.prove(check, source, **truths)
        assert caught.value.verdict is Verdict.MISMATCH
        assert caught.value.comparisons
        self.outliers, self.report = caught.value.outliers, caught.value.report
        return caught.value.reason


@pytest.fixture
def bench(tmp_path: Path, double: dict[str, Any], write_definition: Any) -> Bench:
    write_definition(double, 1)
    return Bench(tmp_path)


def test_the_outlier_of_two_sources_is_named_with_its_error_and_the_factor(bench: Bench) -> None:
    told = bench.refuted("agreement", fine=off_by(2.0**-20), coarse=off_by(2.0**-10))

    assert "coarse against fine" in told
    assert "coarse's y is 0.00098 from float64, fine's 9.5e-07: 1.02e+03 times further" in told
    assert told.endswith("beyond its tolerance: coarse")
    assert bench.outliers == {"coarse"}


def test_the_outlier_is_named_when_it_is_the_one_that_all_others_are_held_against(bench: Bench) -> None:
    told = bench.refuted("agreement", wrong=off_by(1.0), one=exactly, two=exactly)

    assert "one against wrong" in told
    assert "two against wrong" in told
    assert "wrong's y is 1 from float64" in told
    assert told.endswith("the other is exact; beyond its tolerance: wrong")


def test_sources_that_are_both_off_are_said_to_be(bench: Bench) -> None:
    told = bench.refuted("agreement", one=off_by(1.0), two=off_by(2.0))

    assert told.endswith("2 times further; none is within its tolerance of it")


def test_sources_that_agree_and_are_off_together_are_a_mismatch(bench: Bench) -> None:
    told = bench.refuted("agreement", one=off_by(0.5), two=off_by(0.5))

    assert told.startswith("the sources agree with each other, but y is off at [0, ")
    assert "[double_n4, one against float64]; y is off at" in told
    assert told.endswith("equally far; none is within its tolerance of it")
    assert bench.outliers == {"one", "two"}


def test_the_report_tells_of_each_that_is_off_together_what_explains_it_and_where_it_is_worst(
    tmp_path: Path, double: dict[str, Any], write_definition: Any
) -> None:
    write_definition(double, 16)
    bench = Bench(tmp_path)
    bench.workload = "b16"

    told = bench.refuted("agreement", one=lambda x: x * 2.5, two=lambda x: x * 2.5)

    assert told.count("all of it explained by a factor of 1.25") == 2
    assert bench.report.count("64 of 64 elements are outside the tolerance") == 2
    assert bench.report.count("explained by a factor of 1.25") == 2
    assert bench.report.count("] is ") == 10, "the five worst of each, with what they should be"


def test_of_sources_that_agree_only_those_off_from_float64_are_told_and_run_again(bench: Bench) -> None:
    calls: list[str] = []

    def near(x: torch.Tensor) -> torch.Tensor:
        calls.append("near")
        return x * 2 + 0.9e-5

    def far(x: torch.Tensor) -> torch.Tensor:
        calls.append("far")
        return x * 2 + 1.8e-5

    bench.refuted("agreement", near=near, far=far)

    assert bench.report.count("outside the tolerance") == 1
    assert bench.outliers == {"far"}
    assert calls == ["near", "far", "far"]


def test_a_wrong_library_leaves_a_right_reference_red_and_takes_the_blame(bench: Bench) -> None:
    told = bench.refuted("numerics", "library", library=off_by(0.5))

    assert "library's y is 0.5 from float64, reference's 0: the other is exact" in told
    assert told.endswith("beyond its tolerance: library")


def test_a_wrong_reference_takes_the_blame_itself(
    tmp_path: Path, double: dict[str, Any], write_definition: Any
) -> None:
    write_definition(double, 1)

    told = Bench(tmp_path, "return x * 2 + 0.5").refuted("numerics", "library", library=exactly)

    assert told.endswith("beyond its tolerance: reference")


def changing(first: float, then: float) -> Truth:
    """A source whose second call differs from its first."""
    errors = iter([first])
    return lambda x: x * 2 + next(errors, then)


def test_sources_that_disagree_because_one_changes_its_mind_are_nondeterministic(bench: Bench) -> None:
    with pytest.raises(Finding) as caught:
        bench.prove("agreement", one=exactly, two=changing(1.0, 0.0))

    assert caught.value.verdict is Verdict.NONDETERMINISTIC
    assert "a second run of two on equal inputs differs: y" in caught.value.reason
    assert "two's y is 1 from float64" in caught.value.reason


def test_sources_that_were_off_together_once_are_nondeterministic(bench: Bench) -> None:
    with pytest.raises(Finding) as caught:
        bench.prove("agreement", one=changing(0.5, 0.0), two=off_by(0.5))

    assert caught.value.verdict is Verdict.NONDETERMINISTIC
    assert caught.value.reason.startswith("the sources agree with each other, but y is off at [0, ")
    assert caught.value.reason.endswith(
        "; a second run of one on equal inputs differs: y in 4 of 4 elements, by up to 0.5"
    )
    assert caught.value.report.endswith(caught.value.reason.rpartition("; ")[2])
    assert caught.value.outliers == {"one", "two"}


def test_a_third_source_that_changes_its_mind_is_found_behind_one_that_is_wrong(bench: Bench) -> None:
    with pytest.raises(Finding) as caught:
        bench.prove("agreement", one=exactly, two=off_by(1.0), three=changing(2.0, 0.0))

    assert caught.value.verdict is Verdict.NONDETERMINISTIC
    assert caught.value.reason.count("a second run of three on equal inputs differs: y") == 1


def test_sources_that_disagree_the_same_way_again_mismatch(bench: Bench) -> None:
    assert "a second run" not in bench.refuted("agreement", one=exactly, two=off_by(1.0))


def test_without_a_formula_the_mismatch_stays_and_says_so(bench: Bench) -> None:
    bench.referee = None

    told = bench.refuted("agreement", one=exactly, two=off_by(1.0))

    assert told.endswith("no word from float64: NoReferee: no float64 formula of double")
    assert bench.outliers == set()
    assert bench.prove("agreement", one=exactly, two=exactly).comparisons


@pytest.mark.parametrize("fault", [IndexError, KeyError, LookupError], ids=lambda fault: fault.__name__)
def test_a_formula_that_fails_where_sources_agree_is_no_agreement(bench: Bench, fault: type[Exception]) -> None:
    def failing(x: torch.Tensor) -> Any:  # noqa: ARG001 - sources are called by name
        raise fault("out of order")

    bench.referee = failing

    with pytest.raises(fault, match="out of order"):
        bench.prove("agreement", one=exactly, two=exactly)


def test_without_memory_for_float64_the_mismatch_stays_and_says_so(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refgrid.dataset.memory._WIDER", 1e15)

    told = bench.refuted("agreement", one=exactly, two=off_by(1.0))

    assert "no word from float64: NoReferee" in told
    assert "are free" in told


def test_a_formula_that_fails_does_not_hide_what_was_found(bench: Bench) -> None:
    def failing(x: torch.Tensor) -> Any:  # noqa: ARG001 - sources are called by name
        raise RuntimeError("out of order")

    bench.referee = failing

    told = bench.refuted("agreement", one=exactly, two=off_by(1.0))

    assert "two against one" in told
    assert told.endswith("no word from float64: RuntimeError: out of order")


def test_what_is_not_finite_is_infinitely_far(bench: Bench) -> None:
    told = bench.refuted("agreement", one=exactly, two=lambda x: x * torch.nan)

    assert "two's y is inf from float64" in told


def test_two_sources_of_one_kernel_count_once(bench: Bench) -> None:
    bench.kernels = {"one": "norm.cuh", "two": "norm.cuh"}

    with pytest.raises(Finding, match=r"one and two ran norm\.cuh: one truth") as caught:
        bench.prove("agreement", one=exactly, two=exactly)

    assert caught.value.verdict is Verdict.NO_GROUND_TRUTH


def test_a_third_kernel_makes_two_and_the_record_says_who_counts_once(bench: Bench) -> None:
    bench.kernels = {"one": "norm.cuh", "two": "norm.cuh", "three": "ATen"}

    proof = bench.prove("agreement", one=exactly, two=exactly, three=exactly)

    assert proof.note == "one and two ran norm.cuh: one truth"
    assert bench.hashes["kernels"] == "one: norm.cuh; two: norm.cuh; three: ATen"


FINE, COARSE = off_by(2.0**-22), off_by(2.0**-17)  # both within the 1e-5 that float32 is allowed


def test_a_match_tells_who_is_ten_times_further_from_float64_than_another(bench: Bench) -> None:
    proof = bench.prove("agreement", fine=FINE, coarse=COARSE)

    assert re.fullmatch(r"coarse's y is 7\.\de-06 from float64, fine's 2\.4e-07: 3\d(\.\d)? times further", proof.note)
    assert all(comparison.matches for comparison in proof.comparisons)


def test_a_source_that_is_float64_itself_is_held_to_without_another_computation(bench: Bench) -> None:
    def failing(x: torch.Tensor) -> Any:  # noqa: ARG001 - sources are called by name
        raise AssertionError("float64 was computed again")

    bench.referee, bench.exact = failing, "oracle"

    proof = bench.prove("agreement", fine=FINE, coarse=COARSE, oracle=exactly)

    assert "coarse's y is 7." in proof.note
    assert proof.note.endswith("times further")
    assert "oracle" not in proof.note


def test_who_counts_once_and_who_is_further_are_told_in_one_note(bench: Bench) -> None:
    bench.kernels = {"one": "norm.cuh", "two": "norm.cuh"}

    proof = bench.prove("agreement", one=exactly, two=exactly, coarse=COARSE)

    assert proof.note.startswith("one and two ran norm.cuh: one truth; coarse's y is 7.")
    assert proof.note.endswith("the other is exact")


def test_a_match_tells_nothing_of_errors_alike_nor_of_a_rounding(bench: Bench) -> None:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.nextafter(x * 2, x * 4)

    assert not bench.prove("agreement", one=off_by(2.0**-17), two=off_by(2.0**-18)).note
    assert not bench.prove("agreement", one=exactly, two=rounded).note


def test_a_larger_workload_is_not_computed_in_float64(bench: Bench) -> None:
    bench.size = "medium"

    assert not bench.prove("agreement", fine=FINE, coarse=COARSE).note


def test_what_is_infinite_in_float64_has_no_part_in_the_size_of_a_rounding() -> None:
    exact = {"lse": torch.tensor([-torch.inf, 1.0, 2.0], dtype=torch.float64)}
    sides = {"fine": {"lse": exact["lse"].float()}, "coarse": {"lse": exact["lse"].float() + 1e-3}}

    told = told_further(hold(sides, exact, lambda *_: Tolerance(1e-2, 0.0)), exact)

    assert told == "coarse's lse is 0.001 from float64, fine's 0: the other is exact"


def test_each_source_is_judged_by_its_own_tolerance() -> None:
    exact = {"y": torch.zeros(3, dtype=torch.float64)}
    sides = {"coarse": {"y": torch.full((3,), 1e-2)}, "fine": {"y": torch.full((3,), 1e-3)}}

    told, outliers = settle(["y"], sides, exact, lambda side, _: Tolerance(0.1 if side == "coarse" else 1e-4, 0.0))

    assert told.endswith("10 times further; beyond its tolerance: fine")
    assert outliers == {"fine"}


def test_an_output_that_float64_gives_in_another_form_is_left_out() -> None:
    law = {"samples": torch.ones(2, 5, dtype=torch.float64)}
    sides = {"one": {"samples": torch.tensor([1, 2])}, "two": {"samples": torch.tensor([1, 3])}}

    assert settle(["samples"], sides, law, lambda *_: Tolerance(0.0, 0.0)) == ("", frozenset())


def test_the_readme_quotes_what_a_committed_record_says() -> None:
    root = Path(__file__).parents[1]
    readme = " ".join((root / "README.md").read_text().split())
    (quoted,) = re.findall(r'"(flashinfer-fa2\'s lse is [^"]* further)" at 64 sequences of `mla_paged_decode`', readme)

    with gzip.open(root / "results/cu130-overlay-nvidia_h200.jsonl.gz", "rt") as lines:
        told = [outcome for line in lines if quoted in line and (outcome := json.loads(line))["verdict"] == "match"]

    assert any(outcome["case"].startswith("mla_paged_decode") and "-b64_" in outcome["case"] for outcome in told)

"""Expected failures: a known one turns green with its reason, one that is gone or misspelt turns red."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from refgrid.dataset.case import Selection, plan
from refgrid.dataset.definition import load_dataset
from refgrid.environments.declared import load_environments
from refgrid.proving.expected import ExpectedError, load_expected
from refgrid.records.record import Verdict
from refgrid.sources import Sources

ROOT = Path(__file__).parents[1]

ENTRY = """
[[expected]]
cases = ["double_*-b1-sum", "other-*"]
environments = ["cu130*", "cu132-newest"]
verdict = "mismatch"
reason = "the library doubles twice"
link = "https://example.org/issues/1"
"""


SOME_INPUTS = """
outlier = "sum"
other_seeds = ["double_*-sum"]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "expected_failures.toml"
    written.write_text(ENTRY)
    return written


def test_a_known_failure_is_expected_and_says_why(file: Path) -> None:
    known = load_expected(file, "cu130-overlay", "cuda")

    assert load_expected(file, "cu132-newest", "cuda").entries == known.entries
    assert known.revise("double_n4-b1-sum", 0, Verdict.MISMATCH, "y is off") == (
        Verdict.EXPECTED,
        "the library doubles twice (https://example.org/issues/1): y is off",
    )


@pytest.mark.parametrize(
    ("case", "verdict"),
    [
        pytest.param("double_n4-b1-sum", Verdict.CRASH, id="another verdict"),
        pytest.param("double_n4-b2-sum", Verdict.MISMATCH, id="another case"),
    ],
)
def test_nothing_else_is_excused(file: Path, case: str, verdict: Verdict) -> None:
    assert load_expected(file, "cu130", "cuda").revise(case, 0, verdict, "why") == (verdict, "why")


def test_another_environment_is_not_excused(file: Path) -> None:
    known = load_expected(file, "cpu", "cuda")

    assert known.revise("double_n4-b1-sum", 0, Verdict.MISMATCH, "why") == (Verdict.MISMATCH, "why")


@pytest.mark.parametrize(("device", "verdict"), [("cuda", Verdict.EXPECTED), ("cpu", Verdict.MISMATCH)])
def test_another_device_is_not_excused(file: Path, device: str, verdict: Verdict) -> None:
    file.write_text(ENTRY + 'device = "cuda"\n')

    assert load_expected(file, "cu130", device).revise("other-1", 0, Verdict.MISMATCH, "why")[0] is verdict


def test_an_expected_failure_that_matches_is_an_error(file: Path) -> None:
    verdict, reason = load_expected(file, "cu130", "cuda").revise("double_n4-b1-sum", 0, Verdict.MATCH, "")

    assert verdict is Verdict.ERROR
    assert "mismatch was expected (the library doubles twice) but the case matches" in reason


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fault_that_any_inputs_show_is_expected_of_every_seed(file: Path, seed: int) -> None:
    known = load_expected(file, "cu130", "cuda")

    assert known.revise("other-1", seed, Verdict.MISMATCH, "why")[0] is Verdict.EXPECTED
    assert known.revise("other-1", seed, Verdict.MATCH, "")[0] is Verdict.ERROR


def test_a_fault_of_some_inputs_may_hit_others_with_those_of_another_seed(file: Path) -> None:
    file.write_text(ENTRY + SOME_INPUTS)
    known = load_expected(file, "cu130", "cuda")

    def found(case: str, seed: int, verdict: Verdict) -> Verdict:
        return known.revise(case, seed, verdict, "why", {"sum"})[0]

    hit, spared, another = "double_n4-b1-sum", "double_n4-b2-sum", "other-1"
    assert [found(hit, seed, Verdict.MATCH) for seed in (0, 7)] == [Verdict.ERROR, Verdict.MATCH]
    assert [found(spared, seed, Verdict.MISMATCH) for seed in (0, 7)] == [Verdict.MISMATCH, Verdict.EXPECTED]
    assert [found(spared, 7, verdict) for verdict in (Verdict.MATCH, Verdict.CRASH)] == [Verdict.MATCH, Verdict.CRASH]
    assert found(another, 7, Verdict.MISMATCH) is Verdict.MISMATCH


def test_other_seeds_that_match_no_case_are_an_error(file: Path) -> None:
    file.write_text(ENTRY + SOME_INPUTS.replace("double_", "treble_"))

    with pytest.raises(ExpectedError, match=r"'treble_.*matches no case"):
        load_expected(file, "cu130", "cuda").check(["double_n4-b1-sum", "other-1"])


@pytest.mark.parametrize(
    ("off", "told"),
    [
        pytest.param({"other"}, "other", id="another source"),
        pytest.param({"sum", "other"}, "other, sum", id="another source too"),
        pytest.param({"sum", "reference"}, "reference, sum", id="the reference too"),
        pytest.param(set(), "none that float64 names", id="nobody knows"),
    ],
)
@pytest.mark.parametrize("seed", [0, 7])
def test_a_mismatch_is_excused_only_where_the_blamed_source_alone_is_off(
    file: Path, off: set[str], told: str, seed: int
) -> None:
    file.write_text(ENTRY + SOME_INPUTS)
    known = load_expected(file, "cu130", "cuda")

    verdict, reason = known.revise("double_n4-b1-sum", seed, Verdict.MISMATCH, "y is off", off)

    assert verdict is Verdict.MISMATCH
    excused = "expected_failures.toml excuses it where sum alone is off"
    assert reason == f"y is off; {excused}, but off is {told}"
    assert known.revise("double_n4-b1-sum", seed, Verdict.MISMATCH, "y is off", {"sum"})[0] is Verdict.EXPECTED


def test_of_two_known_faults_of_one_case_the_one_that_is_blamed_excuses_it(file: Path) -> None:
    file.write_text(ENTRY + 'outlier = "sum"\n' + ENTRY + 'outlier = "other"\n')
    known = load_expected(file, "cu130", "cuda")

    assert known.revise("double_n4-b1-sum", 0, Verdict.MISMATCH, "why", {"other"})[0] is Verdict.EXPECTED
    assert "where sum or other alone is off" in known.revise("double_n4-b1-sum", 0, Verdict.MISMATCH, "why")[1]


def test_an_outlier_that_is_the_source_of_no_listed_case_is_an_error(file: Path) -> None:
    file.write_text(ENTRY + 'outlier = "summ"\n')

    with pytest.raises(ExpectedError, match="outlier 'summ' is the source of none of the cases"):
        load_expected(file, "cu130", "cuda").check(["double_n4-b1-sum", "other-1"])


def test_an_entry_that_matches_no_case_is_an_error(file: Path) -> None:
    known = load_expected(file, "cu130", "cuda")
    known.check(["double_n4-b1-sum", "other-1"])

    with pytest.raises(ExpectedError, match="matches no case"):
        known.check(["double_n4-b1-sum"])


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        pytest.param(("mismatch", "wrong"), "expected.0.verdict", id="verdict"),
        pytest.param(("https://", ""), "expected.0.link", id="link"),
        pytest.param(("reason =", "why ="), "expected.0.reason", id="key"),
        pytest.param(("[[expected]]", "[["), "is no TOML", id="syntax"),
        pytest.param(("reason =", 'other_seeds = ["*"]\nreason ='), "other_seeds without outlier", id="blames nobody"),
        pytest.param(
            ('"mismatch"', '"crash"\noutlier = "sum"'), "outlier beside verdict 'crash'", id="blame of a crash"
        ),
    ],
)
def test_a_broken_file_names_the_field(file: Path, damage: tuple[str, str], told: str) -> None:
    file.write_text(ENTRY.replace(*damage))

    with pytest.raises(ExpectedError, match=told):
        load_expected(file, "cu130", "cuda")


def test_every_entry_of_ours_covers_an_environment_and_cases_and_blames_their_source() -> None:
    """Environments with GPUs are seldom run: an entry that is not true any more is found here first."""
    dataset, sources, file = load_dataset(ROOT), Sources(), ROOT / "ci" / "expected_failures.toml"
    names = {case.name for case in plan(dataset, {op: sources.serving(op) for op in sources.ops}, Selection())}
    there = list(load_environments(ROOT / "ci" / "environments.toml"))
    known = {(name, device): load_expected(file, name, device) for name in there for device in ("cpu", "cuda")}

    for each in known.values():
        each.check(names)
    globs = {glob for each in known.values() for entry in each.entries for glob in entry.environments}
    assert all(fnmatch.filter(there, glob) for glob in globs)
    assert sum(line.startswith("[[expected]]") for line in file.read_text().splitlines()) == len(
        {entry for each in known.values() for entry in each.entries}
    )


def test_no_file_expects_nothing(tmp_path: Path) -> None:
    assert load_expected(tmp_path / "none.toml", "cpu", "cuda").entries == ()

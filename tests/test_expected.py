"""Expected failures: a known one turns green with its reason, one that is gone or misspelt turns red."""

from __future__ import annotations

from pathlib import Path

import pytest

from refgrid.proving.expected import ExpectedError, load_expected
from refgrid.records.record import Verdict

ENTRY = """
[[expected]]
cases = ["double_*-b1-sum", "other-*"]
environments = ["cu130*", "cu132-newest"]
verdict = "mismatch"
reason = "the library doubles twice"
link = "https://example.org/issues/1"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "expected_failures.toml"
    written.write_text(ENTRY)
    return written


def test_a_known_failure_is_expected_and_says_why(file: Path) -> None:
    known = load_expected(file, "cu130-overlay")

    assert load_expected(file, "cu132-newest").entries == known.entries
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
    assert load_expected(file, "cu130").revise(case, 0, verdict, "why") == (verdict, "why")


def test_another_environment_is_not_excused(file: Path) -> None:
    known = load_expected(file, "cpu")

    assert known.revise("double_n4-b1-sum", 0, Verdict.MISMATCH, "why") == (Verdict.MISMATCH, "why")


def test_an_expected_failure_that_matches_is_an_error(file: Path) -> None:
    verdict, reason = load_expected(file, "cu130").revise("double_n4-b1-sum", 0, Verdict.MATCH, "")

    assert verdict is Verdict.ERROR
    assert "mismatch was expected (the library doubles twice) but the case matches" in reason


@pytest.mark.parametrize("seed", [0, 7])
def test_a_fault_that_any_inputs_show_is_expected_of_every_seed(file: Path, seed: int) -> None:
    known = load_expected(file, "cu130")

    assert known.revise("other-1", seed, Verdict.MISMATCH, "why")[0] is Verdict.EXPECTED
    assert known.revise("other-1", seed, Verdict.MATCH, "")[0] is Verdict.ERROR


def test_a_fault_of_some_inputs_may_hit_others_with_those_of_another_seed(file: Path) -> None:
    file.write_text(ENTRY + 'other_seeds = ["double_*-sum"]\n')
    known = load_expected(file, "cu130")

    def found(case: str, seed: int, verdict: Verdict) -> Verdict:
        return known.revise(case, seed, verdict, "why")[0]

    hit, spared, another = "double_n4-b1-sum", "double_n4-b2-sum", "other-1"
    assert [found(hit, seed, Verdict.MATCH) for seed in (0, 7)] == [Verdict.ERROR, Verdict.MATCH]
    assert [found(spared, seed, Verdict.MISMATCH) for seed in (0, 7)] == [Verdict.MISMATCH, Verdict.EXPECTED]
    assert [found(spared, 7, verdict) for verdict in (Verdict.MATCH, Verdict.CRASH)] == [Verdict.MATCH, Verdict.CRASH]
    assert found(another, 7, Verdict.MISMATCH) is Verdict.MISMATCH


def test_other_seeds_that_match_no_case_are_an_error(file: Path) -> None:
    file.write_text(ENTRY + 'other_seeds = ["treble_*"]\n')

    with pytest.raises(ExpectedError, match=r"'treble_.*matches no case"):
        load_expected(file, "cu130").check(["double_n4-b1-sum", "other-1"])


def test_an_entry_that_matches_no_case_is_an_error(file: Path) -> None:
    known = load_expected(file, "cu130")
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
    ],
)
def test_a_broken_file_names_the_field(file: Path, damage: tuple[str, str], told: str) -> None:
    file.write_text(ENTRY.replace(*damage))

    with pytest.raises(ExpectedError, match=told):
        load_expected(file, "cu130")


def test_no_file_expects_nothing(tmp_path: Path) -> None:
    assert load_expected(tmp_path / "none.toml", "cpu").entries == ()

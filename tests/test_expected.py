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
    assert known.revise("double_n4-b1-sum", Verdict.MISMATCH, "y is off") == (
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
    assert load_expected(file, "cu130").revise(case, verdict, "why") == (verdict, "why")


def test_another_environment_is_not_excused(file: Path) -> None:
    known = load_expected(file, "cpu")

    assert known.revise("double_n4-b1-sum", Verdict.MISMATCH, "why") == (Verdict.MISMATCH, "why")


def test_an_expected_failure_that_matches_is_an_error(file: Path) -> None:
    verdict, reason = load_expected(file, "cu130").revise("double_n4-b1-sum", Verdict.MATCH, "")

    assert verdict is Verdict.ERROR
    assert "mismatch was expected (the library doubles twice) but the case matches" in reason


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

"""What committed records say of tolerances: what they prove, what they contradict, and which rows they widen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from calibrated import ROOT, committed, dataset, derive, measured
from click.testing import CliRunner

from refgrid.calibration import underived
from refgrid.calibration.derive import Row
from refgrid.calibration.evidence import Seen, comparisons, contradicted, green_under, seen, tightened, widened
from refgrid.calibration.table import measurements, rows
from refgrid.calibration.underived import FILE, Exemption, exemptions, matched, outdated, unstated
from refgrid.cli import main
from refgrid.dataset.case import Case
from refgrid.proving.tolerance import Tolerance
from refgrid.records.record import Outcome, Verdict


@pytest.mark.parametrize(
    ("most", "headroom", "bound", "green"),
    [
        pytest.param(1e-4, 0.9, Tolerance(1e-4, 0), True, id="the largest error is within atol"),
        pytest.param(1e-1, 0.5, Tolerance(4e-3, 1e-2), True, id="half of what was allowed"),
        pytest.param(1e-1, 0.5, Tolerance(3.9e-3, 1e-2), False, id="small numbers may be off by more"),
        pytest.param(1e-1, 0.5, Tolerance(4e-3, 4.9e-3), False, id="large numbers may be off by more"),
    ],
)
def test_a_record_proves_another_tolerance_or_does_not(
    most: float, headroom: float, bound: Tolerance, *, green: bool
) -> None:
    told = {"max_abs_error": most, "headroom": headroom, "atol": 8e-3, "rtol": 1e-2}

    assert green_under(told, bound) is green


def test_every_committed_match_is_proven_green_under_the_table() -> None:
    assert sum(1 for run in committed() for _ in comparisons(run, dataset())) > 10_000
    assert contradicted(committed(), dataset()) == []


def test_a_table_that_is_too_tight_is_contradicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgrid.calibration.evidence.tolerance_for", lambda *_: Tolerance(1e-9, 1e-9))

    assert len(contradicted(committed(), dataset())) > 1000


@pytest.mark.parametrize(("needed", "told"), [(1e-4, []), (1.1e-4, ["d-w-agreement"])])
def test_two_that_agreed_are_held_to_the_looser_of_their_rows(
    needed: float, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first of the plan gives y alone, so that the other two's z was held against nothing."""
    loose = {"b on cuda": Tolerance(1e-4, 1e-2)}
    monkeypatch.setattr(
        "refgrid.calibration.evidence.tolerance_for", lambda *key: loose.get(key[-1], Tolerance(1e-6, 1e-2))
    )

    def compared(output: str, atol: float) -> dict[str, Any]:
        same = {"max_abs_error": 0.5, "headroom": 0.9, "atol": 8e-3, "rtol": 1e-2, "nonfinite_mismatches": 0}
        return {"output": output, "needed_atol": atol, **same}

    def ended(source: str | None, *found: dict[str, Any]) -> Outcome:
        check: Any = "numerics" if source else "agreement"
        return Outcome(Case("d", "op", "op", "w", check, source), Verdict.MATCH, comparisons=found)

    ours = [ended("a", compared("y", 0)), ended("c", compared("y", 0), compared("z", 0))]
    theirs = ended("b", compared("y", 1e-4), compared("z", 1e-4))
    outcomes = [ours[0], theirs, ours[1], ended(None, compared("y", needed), compared("y", 1e-6))]
    environment = SimpleNamespace(device="cuda")
    header = SimpleNamespace(environment=environment, planned=[each.case for each in outcomes])
    run: Any = SimpleNamespace(header=header, outcomes={each.case.id: each for each in outcomes})
    spec = SimpleNamespace(dtype="bfloat16")
    known: Any = SimpleNamespace(definitions={"d": SimpleNamespace(outputs={"y": spec, "z": spec})})

    assert [line.partition(":")[0] for line in contradicted([run], known)] == told


def test_records_tighten_only_what_they_hold_comparisons_of() -> None:
    found = seen(committed(), dataset())
    keys = {(row.truth, row.op, row.dtype, row.output) for row in tightened(found)}

    assert keys <= found.keys()
    assert ("transformers on cuda", "gqa_paged_decode", "float32", "lse") not in keys  # it gives none


@pytest.mark.parametrize(
    ("proven", "found"),
    [
        pytest.param(None, Tolerance(1e-3, 1e-2, row_norm=4e-3), id="nothing"),
        pytest.param(Seen(4e-4, 0.1), Tolerance(1e-3, 1e-2, row_norm=4e-3), id="less than is allowed"),
        pytest.param(Seen(2e-3, 0.3), Tolerance(4e-3, 1e-2, row_norm=4e-3), id="twice what is seen"),
        pytest.param(Seen(7e-3, 0.9), Tolerance(8e-3, 1e-2, row_norm=4e-3), id="never more than by hand"),
        pytest.param(Seen(0, 0, 3e-3), Tolerance(1e-3, 1e-2, row_norm=6e-3), id="rows"),
    ],
)
def test_a_row_of_small_draws_is_as_wide_as_records_of_all_sizes_need(proven: Seen | None, found: Tolerance) -> None:
    row = derive(reference=(1e-3, 0), formula=(0, 0), own=(0, 0), pair=(1e-3, 5e-4))
    assert (row.atol, row.rtol, row.row_norm, row.allowed) == (1e-3, 1e-2, 4e-3, 8e-3)

    told = widened(row, proven)

    assert Tolerance(told.atol, told.rtol, row_norm=told.row_norm) == found
    assert ("need" in told.provenance) == (found != Tolerance(1e-3, 1e-2, row_norm=4e-3))


def test_what_a_calibrated_row_let_match_does_not_make_it_wider_each_time() -> None:
    row = derive(reference=(1e-3, 0), formula=(0, 0), own=(0, 0), pair=(1e-3, 5e-4))

    once = widened(row, Seen(met_atol=2.5e-3, met_rtol=9e-3))
    again = widened(row, Seen(met_atol=once.atol, met_rtol=once.rtol))

    assert (once.atol, once.rtol) == (3e-3, 1e-2)  # rounded up, not doubled
    assert (again.atol, again.rtol) == (once.atol, once.rtol)


@pytest.mark.parametrize("atol_then", [8e-3, 6e-3], ids=["by hand", "calibrated"])
def test_what_a_comparison_needed_counts_whatever_was_allowed(atol_then: float) -> None:
    found = wide_as({"needed_atol": 1e-3, "atol": atol_then})

    assert found.atol == 2e-3
    assert found.provenance.endswith("as wide as 1 comparisons in e on NVIDIA H200, 2026-11-22 need")


@pytest.mark.parametrize(("atol_then", "atol"), [(8e-3, 8e-3), (6e-3, 3e-3)], ids=["by hand, twice", "calibrated"])
def test_a_comparison_without_what_it_needed_may_have_needed_all_that_it_used(atol_then: float, atol: float) -> None:
    found = wide_as({"atol": atol_then})

    assert found.atol == atol
    assert found.provenance.endswith("2026-11-22 may need")


def test_what_was_needed_beside_another_rtol_is_not_taken_for_what_is_needed_beside_the_limits() -> None:
    found = wide_as({"needed_atol": 0.0, "atol": 6e-3, "rtol": 5e-3})

    assert found.atol == 3e-3  # with half of that rtol so much is proven, and not 0
    assert found.provenance.endswith("2026-11-22 may need")


def test_of_float32_the_headroom_counts_as_rtol_shrinks_with_atol() -> None:
    found = wide_as({"needed_atol": 0.0, "atol": 1e-5, "rtol": 1e-5}, "float32")

    assert (found.atol, found.rtol) == (1e-5, 1e-5)  # twice a headroom of one half
    assert found.provenance.endswith("2026-11-22 may need")


@pytest.mark.parametrize(
    ("needed", "bound", "green"),
    [(1e-4, Tolerance(1e-4, 1e-2), True), (1.1e-4, Tolerance(1e-4, 1e-2), False), (0.0, Tolerance(1e-4, 9e-3), False)],
    ids=["so much", "more", "beside a larger rtol"],
)
def test_what_was_needed_proves_a_row_that_follows_from_it(needed: float, bound: Tolerance, *, green: bool) -> None:
    told = {"max_abs_error": 0.5, "headroom": 0.9, "atol": 8e-3, "rtol": 1e-2, "needed_atol": needed}

    assert green_under(told, bound) is green


def wide_as(told: dict[str, float], dtype: str = "bfloat16") -> Row:
    """A row of little beside one record on a GPU, which had half of what was allowed."""
    row = derive(dtype, reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(1e-4, 1e-5))
    return widened(row, recorded(told, dtype)["lib on cuda", "some_op", dtype, "y"])


def recorded(told: dict[str, float], dtype: str, source: str | None = "lib") -> dict[tuple[str, str, str, str], Seen]:
    """What is seen in a record of one match on a GPU, of a comparison with a source or of two sources' agreement."""
    match = {"output": "y", "max_abs_error": 0.5, "headroom": 0.5, "rtol": 1e-2, "nonfinite_mismatches": 0, **told}
    case = SimpleNamespace(definition="d", op="some_op", source=source)
    outcome = SimpleNamespace(case=case, hashes={}, comparisons=[match], verdict=SimpleNamespace(value="match"))
    environment = SimpleNamespace(title="e on NVIDIA H200", device="cuda")
    header = SimpleNamespace(environment=environment, started="2026-11-22T00:00:00", planned=[case])
    run: Any = SimpleNamespace(header=header, outcomes={"case": outcome})
    known: Any = SimpleNamespace(definitions={"d": SimpleNamespace(outputs={"y": SimpleNamespace(dtype=dtype)})})
    return seen([run], known)


def test_what_two_truths_differ_by_makes_neither_row_wider() -> None:
    """Else FlashInfer's distance from the oracle would be what the reference may be off from the oracle."""
    told = {"needed_atol": 1e-3, "atol": 8e-3}

    assert recorded(told, "bfloat16")
    assert recorded(told, "bfloat16", source=None) == {}


LIB = ("lib on cuda", "some_op", "y")


def test_every_match_in_committed_records_has_a_derived_row_or_a_stated_reason() -> None:
    found, matches = (
        rows(measurements(ROOT / "results/calibration"), committed(), dataset()),
        matched(committed(), dataset()),
    )

    assert len(matches) > 200
    assert list(unstated(found, matches)) == []
    assert outdated(found, matches) == [], f"{FILE.name} gives a reason for what has a row, or does not match"
    assert all(len(each.reason) > 20 for each in exemptions())


def test_a_match_that_has_neither_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = derive(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0, 0))
    assert (row.truth, row.op, row.output) == ("lib on cpu", *LIB[1:])

    (line,) = unstated([row], {LIB, ("lib on cpu", *LIB[1:])})

    assert line.startswith("lib on cuda, some_op, y: matches in committed records but has no derived row; ")
    monkeypatch.setattr(underived, "exemptions", lambda: (Exemption([LIB[0]], [LIB[1]], [LIB[2]], "not drawn"),))
    assert list(unstated([row], {LIB})) == []


def test_the_command_fails_where_a_match_has_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "calibration/here.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**measured(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0, 0)), "absent": {}}))
    monkeypatch.setattr("refgrid.proving.tolerance.CALIBRATED", tmp_path / "tolerance.json")
    monkeypatch.setattr(underived, "matched", lambda *_: {LIB})

    done = CliRunner().invoke(main, ["calibrate", "--no-measure", f"--dataset={ROOT}", f"--results={tmp_path}"])

    assert done.exit_code == 1
    assert "does not hold: lib on cuda, some_op, y: matches in committed records" in done.output
    assert (tmp_path / "tolerance.json").is_file()


def test_a_reason_that_is_needed_no_more_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    truths = ["lib on cpu", "lib on cuda", "other on cuda"]
    monkeypatch.setattr(underived, "exemptions", lambda: (Exemption(truths, ["some_op"], ["y"], "not drawn"),))
    row = derive(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0, 0))

    assert outdated([row], {LIB, ("lib on cpu", *LIB[1:])}) == [("lib on cpu", *LIB[1:]), ("other on cuda", *LIB[1:])]


def test_what_matched_is_told_by_its_device_and_without_what_two_truths_agreed_on() -> None:
    def run(source: str | None, verdict: str, device: str) -> Any:
        compared = {"output": "y", "nonfinite_mismatches": 0}
        case = SimpleNamespace(definition="d", op="some_op", source=source)
        outcome = SimpleNamespace(case=case, hashes={}, comparisons=[compared], verdict=SimpleNamespace(value=verdict))
        header = SimpleNamespace(environment=SimpleNamespace(device=device))
        return SimpleNamespace(header=header, outcomes={"case": outcome})

    known: Any = SimpleNamespace(definitions={"d": SimpleNamespace(outputs={"y": SimpleNamespace(dtype="bfloat16")})})
    runs = [
        run("lib", "match", "cuda"),
        run("red", "mismatch", "cuda"),
        run(None, "match", "cuda"),
        run("b", "match", "cpu"),
    ]

    assert matched(runs, known) == {LIB, ("b on cpu", "some_op", "y")}

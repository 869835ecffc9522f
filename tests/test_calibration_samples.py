"""Random samples in the calibration: false alarms and power as committed, what contradicts them, and their draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import besides, dataset, measured
from click.testing import CliRunner

from refgrid.calibration import samples
from refgrid.calibration.alarms import LEVELS, at_least, section, unsound
from refgrid.calibration.samples import Law, random_ops
from refgrid.cli import main
from refgrid.environments.measured import measure
from refgrid.proving.likelihood import BOUND, POWER, RATE
from refgrid.sources import Sources

ROOT = Path(__file__).resolve().parents[1]
LAW = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
Record = dict[str, Any]


def record(**changed: Any) -> Record:
    """A sound record of one law."""
    fault = {"fault": "temperature_above", "by": 1.25, "cases": 1000, "found": 905, "nats": [1, 2, 3, 4]}
    row = {
        "op": "some_op",
        "law": "some_op_v8-b1",
        "against": "law",
        "draws": 100,
        "rows": 1,
        "outcomes": 8,
        "cases": 5000,
        "nats": [-1, 0, 1, 2],
        "at_most": {"0.5": 2510, "0.1": 505, "0.01": 55, "0.001": 6},
        "red": 0,
        "found": [fault],
        **changed,
    }
    environment = {"name": "here", "torch": "2.13.0"}
    head = {"environment": environment, "date": "2026-01-02T03:04", "seeds": 200, "bound": 15.2, "rate": RATE}
    return {**head, "power": POWER, "measured": [row]}


def test_the_committed_samples_give_no_more_false_alarms_than_stated_and_find_what_is_said() -> None:
    (found,) = besides("samples")

    assert unsound(found) == []
    assert (found["bound"], found["rate"], found["power"]) == (BOUND, RATE, POWER)
    tests = {(row["op"], row["against"]) for row in found["measured"]}
    assert tests == {(op, against) for op in random_ops(dataset(), Sources()) for against in ("law", "draws")}
    assert all(row["cases"] >= 5000 for row in found["measured"])
    for op, against in tests:
        mine = [row for row in found["measured"] if (row["op"], row["against"]) == (op, against)]
        assert any(row["found"] for row in mine), f"no fault is drawn of {op} against {against}"


def test_a_test_of_uniform_p_values_is_sound() -> None:
    assert unsound(record()) == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        pytest.param(
            {"at_most": {"0.5": 2700, "0.1": 0, "0.01": 0, "0.001": 0}}, "p is at most 0.5 in 2700 of 5000", id="half"
        ),
        pytest.param(
            {"at_most": {"0.5": 0, "0.1": 0, "0.01": 0, "0.001": 25}}, "p is at most 0.001 in 25 of 5000", id="tail"
        ),
        pytest.param({"red": 2}, "p is at most 2.5e-07 in 2 of 5000", id="red twice"),
        pytest.param({"at_most": {"0.5": 0}}, "p-values are counted at ['0.5']", id="not counted"),
        pytest.param(
            {"found": [{"fault": "likeliest_times", "by": 1.25, "cases": 1000, "found": 850, "nats": [0]}]},
            "likeliest times 1.25 is found in 850 of 1000 cases, but should be in a share of 0.9",
            id="not found",
        ),
    ],
)
def test_what_a_right_test_would_not_give_is_told(changed: Record, told: str) -> None:
    (line,) = unsound(record(**changed))

    assert line.startswith(f"some_op, some_op_v8-b1, against law: {told}")


def test_few_seeds_are_told() -> None:
    assert unsound({**record(), "seeds": 199}) == ["199 seeds, but should be 200"]


def test_the_committed_samples_would_be_seen_to_be_wrong() -> None:
    """Any one row of them, with p-values that are small ten times too often."""
    (found,) = besides("samples")
    for row in found["measured"]:
        often = {f"{level:g}": int(min(1, 10 * level) * row["cases"]) for level in LEVELS}

        assert len(unsound({**found, "measured": [{**row, "at_most": often}]})) == len(LEVELS)


@pytest.mark.parametrize(
    ("count", "share", "probability"), [(0, 0.3, 1.0), (3, 0.3, 0.027), (2, 0.5, 0.5), (1, 0.1, 0.271)]
)
def test_the_tail_of_a_binomial(count: int, share: float, probability: float) -> None:
    assert at_least(count, 3, share) == pytest.approx(probability)


def test_the_report_has_a_row_for_each_law() -> None:
    told = section([record()])

    assert (
        "\n| some_op | some_op_v8-b1 | law | 100 x 1 | 5000 | 0.5 | 0.1 | 0.011 | 0.0012 | 2 "
        "| temperature above 1.25 in 905 of 1000 |\n" in told
    )
    assert "Measured in here (torch 2.13.0), 2026-01-02, with 200 seeds." in told
    assert section([]) == ""


# ---- how they are drawn


@pytest.fixture
def few_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "SEEDS", 20)
    monkeypatch.setattr(samples, "SEEDS_OF_FAULT", 5)


@pytest.mark.usefixtures("few_seeds")
@pytest.mark.parametrize("test", [samples._against_law, samples._against_draws])
def test_draws_of_the_law_itself_are_counted_and_those_of_a_fault_are_found(test: Callable[[Law], Record]) -> None:
    row = test(Law("some_op", "some_op_v4-b1", LAW, 8192))

    assert (row["cases"], row["draws"], row["rows"], row["outcomes"], row["red"]) == (200, 8192, 1, 4, 0)
    assert row["nats"][0] < 0 < BOUND < row["found"][0]["nats"][0]
    assert row["found"]
    assert all((each["cases"], each["found"] >= 45) == (50, True) for each in row["found"])


@pytest.mark.usefixtures("few_seeds")
@pytest.mark.parametrize("test", [samples._against_law, samples._against_draws])
def test_a_sampler_that_is_off_is_seen_in_the_p_values(
    monkeypatch: pytest.MonkeyPatch, test: Callable[[Law], Record]
) -> None:
    found = samples._drawn
    wrong = torch.tensor([[0.4, 0.3, 0.15, 0.15]], dtype=torch.float64)
    monkeypatch.setattr(
        samples, "_drawn", lambda law, draws, seed: found(wrong if seed < 20 and law is LAW else law, draws, seed)
    )
    row = test(Law("some_op", "some_op_v4-b1", LAW, 8192))

    assert row["red"] == row["cases"]
    assert any("p is at most 0.5" in line for line in unsound({**record(), "measured": [row]}))


def test_the_sides_of_a_case_have_draws_of_their_own() -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def nats(one: torch.Tensor, other: torch.Tensor) -> float:
        seen.append((one, other))
        return 0.0

    assert len(samples._nats((LAW, LAW), 50, 2, nats)) == 2 * samples.CASES_A_SEED
    assert not any(torch.equal(*sides) for sides in seen)
    assert len({tuple(one[:, 0].tolist()) for one, _ in seen}) == len(seen)


def test_mass_is_moved_between_halves_by_a_distance() -> None:
    moved = samples._moved(LAW, 0.1)

    assert float(moved.sum()) == pytest.approx(1)
    assert float((moved - LAW).abs().sum()) / 2 == pytest.approx(0.1)


def test_the_command_measures_them_with_any_of_their_ops_and_fails_where_they_are_unsound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**record(red=5), "environment": vars(measure("local", "cpu", Sources().distributions))}
    errors = {**measured(reference=(0, 0)), "absent": {}}
    monkeypatch.setattr("refgrid.calibration.run.measured", lambda *_: iter([("top_p_sampling_from_probs", errors)]))
    monkeypatch.setattr("refgrid.calibration.samples.measured", lambda *_: here)
    monkeypatch.setattr("refgrid.proving.tolerance.CALIBRATED", tmp_path / "tolerance.json")
    options = ["calibrate", f"--dataset={ROOT}", f"--results={tmp_path}"]

    done = CliRunner().invoke(main, [*options, "--op=top_p_sampling_from_probs", "--seeds=1", "-n", "1"])
    derived = CliRunner().invoke(main, [*options, "--no-measure"])

    assert done.exit_code == 0, done.output
    assert "measured: false alarms of random samples" in done.output
    assert [file.name for file in (tmp_path / "calibration").iterdir() if file.is_dir()] == ["samples"]
    assert derived.exit_code == 1
    assert "does not hold: some_op, some_op_v8-b1, against law: p is at most " in derived.output
    assert "| some_op | some_op_v8-b1 |" in (tmp_path / "calibration/report.md").read_text()

"""Calibration: what is measured, the rows that follow, and the committed table, which committed records prove."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from calibrated import besides, committed, dataset, derive, measured
from click.testing import CliRunner

from refgrid.calibration.beyond import Reason, reasons, unexplained, why
from refgrid.calibration.broken import ADVICE, broken
from refgrid.calibration.chosen import choose, lightened
from refgrid.calibration.derive import Row, derived, failures, rounded_up
from refgrid.calibration.left_out import left_out
from refgrid.calibration.report import report
from refgrid.calibration.rounding import FLOAT64, FORMULA, REFERENCE, UNIT
from refgrid.calibration.table import measurements, rows
from refgrid.cli import main
from refgrid.proving.tolerance import CALIBRATED, Tolerance, calibrated, looser, tolerance_for, uncalibrated
from refgrid.sources import Sources

ROOT = Path(__file__).resolve().parents[1]


@cache
def table() -> list[Row]:
    return rows(measurements(ROOT / "results/calibration"), committed(), dataset())


def test_a_row_allows_eight_times_what_was_needed() -> None:
    row = derive(reference=(0, 0), formula=(1e-2, 0), own=(1e-4, 0), pair=(2e-3, 1e-4))

    assert (row.truth, row.atol, row.rtol) == ("lib on cpu", 8e-4, 1e-2)
    assert row.row_norm == 4e-3  # of the dtype's rounding, twice 2e-3
    assert row.holds
    assert row.keeps_three_way


def test_a_truth_that_keeps_the_three_way_bound_gets_no_more_than_that() -> None:
    row = derive(reference=(1e-5, 0), formula=(1e-4, 0), own=(1e-4, 0), pair=(0, 1e-4))

    assert row.atol == 3e-4  # 1e-5 + 2e-4, not 8e-4


def test_a_truth_that_breaks_the_three_way_bound_is_told() -> None:
    row = derive(reference=(0, 0), formula=(1e-5, 0), own=(5e-4, 0), pair=(0, 5e-4))

    assert not row.keeps_three_way
    assert row.atol == 4e-3
    assert "**0.0005**" in report([], [row], dataset())


BEYOND = {"reference": (0, 0), "formula": (1e-5, 0), "own": (5e-4, 0), "pair": (0, 5e-4)}
WHY = Reason(["lib on cpu"], "some_op", "bfloat16", ["y"], 5e-4, "multiplies as bfloat16")
UNEXPLAINED = (
    "lib on cpu, some_op, y (bfloat16): is 0.0005 from float64 but should be at most 2e-05, or have its reason in "
    "beyond.toml: "
)


@pytest.mark.parametrize(
    ("written", "told"),
    [
        pytest.param([WHY], [], id="explained"),
        pytest.param([], [f"{UNEXPLAINED}there is no entry"], id="nothing"),
        pytest.param([replace(WHY, error=4e-4)], [f"{UNEXPLAINED}the entry stands for 0.0004"], id="of less"),
        pytest.param([replace(WHY, outputs=["z"])], [f"{UNEXPLAINED}there is no entry"], id="of another output"),
    ],
)
def test_a_row_beyond_the_three_way_bound_needs_a_reason(
    monkeypatch: pytest.MonkeyPatch, written: list[Reason], told: list[str]
) -> None:
    monkeypatch.setattr("refgrid.calibration.beyond.reasons", lambda: tuple(written))
    row = derive("bfloat16", **BEYOND)

    assert list(unexplained([row])) == told
    assert (WHY.reason in report([], [row], dataset())) == (not told)


def test_the_command_fails_where_a_row_beyond_the_bound_has_no_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "calibration/here.json"
    file.parent.mkdir()
    file.write_text(json.dumps({**measured("bfloat16", **BEYOND), "absent": {}}))
    monkeypatch.setattr("refgrid.proving.tolerance.CALIBRATED", tmp_path / "tolerance.json")

    done = CliRunner().invoke(main, ["calibrate", "--no-measure", f"--dataset={ROOT}", f"--results={tmp_path}"])

    assert done.exit_code == 1
    assert f"does not hold: {UNEXPLAINED}there is no entry" in done.output
    assert (tmp_path / "tolerance.json").is_file()


def test_every_reason_is_of_a_row_beyond_the_bound_and_has_numbers() -> None:
    beyond = [row for row in table() if not row.keeps_three_way]

    assert len(beyond) == 28
    assert all(why(row) for row in beyond)
    for reason in reasons():
        fitting = [row for row in beyond if reason.fits(row)]
        assert len(fitting) == len(reason.truths) * len(reason.outputs), reason
        assert max(row.error or 0 for row in fitting) > 0.9 * reason.error, f"{reason} stands for too much"
        assert any(character.isdigit() for character in reason.reason)


def test_no_row_is_looser_than_the_ceiling_and_what_needs_more_is_a_failure() -> None:
    row = derive(reference=(0, 0), formula=(1, 0), own=(1, 0), pair=(0, 0.5))

    assert row.atol == uncalibrated("some_op", "bfloat16", "y").atol
    assert not row.holds
    assert failures([row]) == [
        "lib on cpu, some_op, y (bfloat16): needs atol 0.5 beside rtol 0.01 but tolerance.toml allows 0.008"
    ]


def test_what_is_never_off_still_may_be_by_a_part_of_a_rounding() -> None:
    row = derive(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0, 0))

    assert row.atol == rounded_up(UNIT["bfloat16"] / 32)
    assert row.row_norm == 4e-3


def test_float32_has_the_rtol_of_its_rounding_where_that_suffices() -> None:
    tight = derive("float32", reference=(0, 0), formula=(1e-6, 0), own=(0, 0), pair=(0, 1e-6))
    wide = derive("float32", reference=(0, 0), formula=(1e-6, 0), own=(0, 0), pair=(0, 1e-4))

    assert tight.rtol == 2e-6
    assert tight.row_norm is None  # element by element is strict enough
    assert wide.rtol == 1e-5


@pytest.mark.parametrize(
    ("value", "up"), [(0.0, 0.0), (1e-3, 1e-3), (1.01e-3, 2e-3), (9.5e-4, 1e-3), (4e-4, 4e-4), (0.3, 0.3)]
)
def test_numbers_are_rounded_up_to_one_digit(value: float, up: float) -> None:
    assert rounded_up(value) == up


@pytest.mark.parametrize(("median", "found"), [(0.025, 0.4), (0.02, None)])
def test_rows_that_cancel_have_no_bound_since_no_draws_give_one(median: float, found: float | None) -> None:
    """mamba_ssu_decode beside transformers: a head whose norm is a two hundredth of the others' came in draw 2005."""
    told = measured(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0.2, 0))
    told["measured"][-1]["row"] = [median, 0.03, 0.1, 0.2]

    (row,) = derived(told)

    assert (row.row_norm, row.row_needed) == (found, 0.2)
    assert ("rows cancel: 0.2 of a norm at most, 0.02 in the median" in row.provenance) == (found is None)


def test_a_bound_of_rows_that_is_kept_by_hand_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgrid.calibration.derive.uncalibrated", lambda *_: Tolerance(8e-3, 1e-2, row_norm=0.1))

    assert derive(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(1e-3, 0)).row_norm == 0.1


def test_no_row_follows_from_a_known_fault_nor_from_other_sizes_than_those_of_a_limit() -> None:
    (on_gpu,) = (each for each in measurements(ROOT / "results/calibration") if each["environment"]["gpu"])
    twins = {
        case: {**axes, "hidden_size": 256} if case.startswith("moe_fp8_block_scale_renorm_") else axes
        for case, axes in on_gpu["workloads"].items()
    }

    found = left_out({**on_gpu, "workloads": twins}, dataset())

    assert "drops tokens between which nothing decays" in found["gdn_prefill", "sglang"]
    assert "hidden_size = 256 for 2048" in found["moe_fp8_block_scale_renorm", "flashinfer"]
    # No fault of its own, no limit of its own, not drawn at other sizes.
    kept = {("gdn_prefill", "flashinfer"), ("moe_fp8_block_scale_renorm", "transformers"), ("gqa_grouped", "torch")}
    assert not kept & set(found)
    assert {(row.op, row.truth) for row in derived(on_gpu, found)}.isdisjoint(
        (op, f"{who} on cuda") for op, who in found
    )


def test_the_committed_table_follows_from_the_committed_measurements() -> None:
    told = json.loads(CALIBRATED.read_text())["rows"]
    found = table()

    assert [row.to_dict() for row in found] == told
    assert failures(found) == []
    assert list(unexplained(found)) == []
    shown = report(measurements(ROOT / "results/calibration"), found, dataset(), besides("samples"), besides("sums"))
    assert shown == (ROOT / "results/calibration/report.md").read_text()


def test_the_report_names_truths_of_which_there_are_few_draws() -> None:
    some = measured(reference=(0, 0), formula=(0, 0), own=(0, 0), truth=(0, 0))
    enough = {**some, "measured": [{**row, "draws": 200} for row in some["measured"]]}

    told = report([some], list(derived(some)), dataset())

    assert "\nFewer than 200 draws, as some of the workloads were refused:\n\n" in told
    assert "- some_op, lib: 9\n" in told
    assert "Fewer than 200 draws" not in report([enough], list(derived(enough)), dataset())


def test_no_calibrated_row_is_looser_than_what_is_kept_by_hand() -> None:
    assert len(calibrated()) > 50
    for (truth, op, dtype, output), row in calibrated().items():
        kept = uncalibrated(op, dtype, output, truth)
        assert replace(looser(row, kept), row_norm=kept.row_norm) == kept, f"{truth}, {op}, {output} is looser"
        assert tolerance_for(op, dtype, output, truth) == row


def few(found: list[dict[str, Any]]) -> dict[tuple[str, str, str, str], int]:
    """Everyone of whose output there are fewer than 200 draws, against float64 or against the reference."""
    less = {}
    for measurement in found:
        for row in measurement["measured"]:
            who = row["who"] if row["against"] == FLOAT64 else row["against"]
            if row["draws"] < 200:
                less[measurement["environment"]["name"], row["op"], row["output"], who] = row["draws"]
    return less


def test_everyone_has_at_least_200_draws_of_each_output() -> None:
    found = measurements(ROOT / "results/calibration")

    assert {each["environment"]["name"] for each in found} == {"cpu", "cu130-overlay"}
    assert all(len({row["op"] for row in each["measured"]}) > 20 for each in found)
    assert few(found) == {}


@pytest.mark.parametrize("who", ["lib", REFERENCE, FORMULA])
def test_one_with_fewer_draws_would_be_seen(who: str) -> None:
    told = measured(reference=(0, 0), formula=(0, 0), own=(0, 0), pair=(0, 0))
    enough = [{**row, "draws": 199 if row["who"] == who else 200} for row in told["measured"]]

    assert ("here", "some_op", "y", who) in few([{**told, "measured": enough}])


def test_workloads_are_small_and_heavy_definitions_are_lightened_only_where_all_are() -> None:
    light, sources = lightened(dataset()), Sources()
    chosen = choose(light, {op: sources.serving(op) for op in sources.ops})

    assert {case.op for case in chosen} == set(sources.ops)
    assert {case.op for case in chosen if light.definitions[case.definition].name != case.definition} <= {
        op for op in sources.ops if "moe" in op
    }


def test_an_op_that_nobody_knows_is_refused() -> None:
    done = CliRunner().invoke(main, ["calibrate", "--op", "gem"])

    assert done.exit_code == 2
    assert "--op 'gem' is not known; legal values: rmsnorm, " in done.output


def test_a_table_is_not_derived_from_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["calibrate", "--no-measure", "--results", str(tmp_path)])

    assert done.exit_code == 2
    assert "holds no measurement" in done.output


MISSING = "missing: lib is not installed (lib)"
REFUSED = "unsupported: sequence 0 sees no key"
RED = "error: RuntimeError: no kernel image is available"
BROKE = f"broken: lib, some_op (here): gave nothing in 1 draw, such as some_op_h4-b1-shape: {RED}"


def test_a_source_that_broke_is_named_with_its_op_how_often_and_why() -> None:
    told = measured(reference=(0, 0))
    told["absent"] = {
        "lib, some_op_h4-b1-shape": RED,
        "lib, some_op_h4-b1-shape-seed3": "oom: out of memory",
        "other, some_op_h4-b1-shape": "hang: took 300 s",
        "third, some_op_h4-b1-shape": MISSING,
    }

    assert broken(told) == [
        f"lib, some_op (here): gave nothing in 2 draws, such as some_op_h4-b1-shape: {RED}",
        "other, some_op (here): gave nothing in 1 draw, such as some_op_h4-b1-shape: hang: took 300 s",
    ]


def test_the_op_of_what_broke_is_the_longest_that_begins_its_definition() -> None:
    told = measured(reference=(0, 0))
    told["measured"] += [{"op": "some_op_fused"}, {"op": "some"}]
    told["absent"] = {"lib, some_op_fused_h4-b1-shape": RED}

    (line,) = broken(told)

    assert line.startswith("lib, some_op_fused (here): ")


def test_nothing_broke_in_the_committed_measurements() -> None:
    found = measurements(ROOT / "results/calibration")

    assert any(each["absent"] for each in found)
    assert [broken(each) for each in found] == [[] for _ in found]


@pytest.mark.parametrize(
    ("absent", "exit_code", "told"),
    [
        pytest.param({"lib, some_op_h4-b1-shape": RED}, 1, f"{BROKE}\n{ADVICE}\n", id="broken"),
        pytest.param({"lib, some_op_h4-b1-shape": MISSING, "lib, some_op_h4-b2-shape": REFUSED}, 0, "", id="absent"),
    ],
)
@pytest.mark.parametrize("derive", [True, False], ids=["derived", "measured"])
def test_the_command_fails_where_a_source_broke_and_has_written_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absent: dict[str, str], exit_code: int, told: str, *, derive: bool
) -> None:
    found = {**measured(reference=(0, 0)), "absent": absent}
    monkeypatch.setattr("refgrid.calibration.run.measured", lambda *_: iter([("some_op", found)]))
    monkeypatch.setattr("refgrid.commands.calibrate._measure_besides", lambda *_: None)
    monkeypatch.setattr("refgrid.proving.tolerance.CALIBRATED", tmp_path / "tolerance.json")
    options = [
        f"--dataset={ROOT}",
        "--environment=here",
        f"--results={tmp_path}",
        "--derive" if derive else "--no-derive",
    ]

    done = CliRunner().invoke(main, ["calibrate", *options])

    assert done.exit_code == exit_code, done.output
    assert done.output.endswith(told)
    assert ("broken: " in done.output) is bool(told)
    assert json.loads((tmp_path / "calibration/here.json").read_text()) == found
    assert (tmp_path / "tolerance.json").is_file() is derive

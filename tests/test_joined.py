"""Some ops measured anew, and the others of the same measurement."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from refgrid.calibration.chosen import choose
from refgrid.calibration.joined import OtherEnvironment, demand_same, joined
from refgrid.calibration.run import Plan, measured
from refgrid.cli import main
from refgrid.environments.measured import Environment, measure
from refgrid.running.dealing import DealingError, dealt
from refgrid.sources import Sources

ROOT = Path(__file__).resolve().parents[1]


def row(op: str, draws: int) -> dict[str, Any]:
    return {"op": op, "dtype": "float32", "output": "y", "who": "lib", "against": "float64", "draws": draws}


def told(date: str, **ops: int) -> dict[str, Any]:
    return {
        "date": date,
        "seeds": 240,
        "workloads": {f"{op}_h4-b1": {"b": 1} for op in ops},
        "measured": [row(op, draws) for op, draws in ops.items()],
        "absent": {f"lib, {op}_h4-b1-shape": "missing: no lib" for op in ops},
    }


def here() -> Environment:
    return measure("there", "cpu", Sources().distributions)


def test_ops_measured_anew_replace_theirs_and_no_others() -> None:
    found = joined(told("later", norm_fused=2), told("earlier", gemm=1, norm=1, norm_fused=1))

    assert [(each["op"], each["draws"]) for each in found["measured"]] == [("gemm", 1), ("norm", 1), ("norm_fused", 2)]
    assert set(found["workloads"]) == {"gemm_h4-b1", "norm_h4-b1", "norm_fused_h4-b1"}
    assert len(found["absent"]) == 3
    assert found["date"] == "earlier"


def test_what_an_op_lacked_before_is_not_lacking_any_more() -> None:
    assert joined({**told("later", gemm=1), "absent": {}}, told("earlier", gemm=1))["absent"] == {}


def test_the_date_is_that_of_the_oldest_op() -> None:
    assert joined(told("later", gemm=2), told("earlier", gemm=1))["date"] == "later"
    assert joined(told("later", gemm=2), told("earlier", gemm=1, norm=1))["date"] == "earlier"


def test_another_version_is_refused() -> None:
    earlier = {"environment": {**vars(here()), "torch": "1.0", "gpu_count": 7}, "seeds": 9}

    with pytest.raises(OtherEnvironment, match=r"torch was 1\.0, and is .*\. Measure all ops"):
        demand_same(earlier, here(), 9)


@pytest.mark.parametrize(("then", "now", "least"), [(9, 3, 9), (240, 199, 200)])
def test_too_few_seeds_are_refused(then: int, now: int, least: int) -> None:
    with pytest.raises(
        OtherEnvironment, match=f"seeds = {now}, but should be at least {least}: the others have {then}"
    ):
        demand_same({"environment": vars(here()), "seeds": then}, here(), now)


@pytest.mark.parametrize(("then", "now"), [(9, 9), (9, 10), (240, 200), (240, 400)])
def test_enough_seeds_complete_a_measurement_of_any_number(then: int, now: int) -> None:
    demand_same({"environment": vars(here()), "seeds": then}, here(), now)


def test_the_seeds_of_an_op_are_kept_where_they_are_not_those_of_all() -> None:
    first = joined({**told("later", gemm=2), "seeds": 400}, told("earlier", gemm=1, norm=1))
    then = joined({**told("last", norm=2), "seeds": 300}, {**first, "measured": [*first["measured"], row("rope", 1)]})
    again = joined(told("last", gemm=2), then)

    assert (first["seeds"], first["seeds_of"]) == (240, {"gemm": 400})
    assert (then["seeds"], then["seeds_of"]) == (240, {"gemm": 400, "norm": 300})
    assert again["seeds_of"] == {"norm": 300}
    assert "seeds_of" not in joined(told("later", gemm=2), told("earlier", gemm=1))


@pytest.fixture
def errors_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is measured besides, which takes minutes: the sums of gemm among it."""
    monkeypatch.setattr("refgrid.commands.calibrate._measure_besides", lambda *_: None)


@pytest.mark.usefixtures("errors_alone")
def test_the_command_keeps_the_other_ops(tmp_path: Path) -> None:
    def run(*ops: str, seeds: int = 2) -> Any:
        options = [f"--op={op}" for op in ops]
        return CliRunner().invoke(main, ["calibrate", *options, f"--seeds={seeds}", "-n", "1", f"--results={tmp_path}"])

    def ops() -> set[str]:
        file = tmp_path / "calibration" / "local.json"
        return {each["op"] for each in json.loads(file.read_text())["measured"]}

    assert run("rmsnorm").exit_code == 0
    assert ops() == {"rmsnorm"}
    assert run("gemm").exit_code == 0
    assert ops() == {"rmsnorm", "gemm"}
    assert run("gemm", seeds=3).exit_code == 0
    assert json.loads((tmp_path / "calibration" / "local.json").read_text())["seeds_of"] == {"gemm": 3}
    refused = run("gemm", seeds=1)

    assert refused.exit_code == 2
    assert "local.json: seeds = 1, but should be at least 2: the others have 2" in refused.output


def test_a_measurement_that_is_ended_keeps_the_ops_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*given: Any) -> Any:
        results = dealt(*given)
        yield next(results)
        raise DealingError("a process on the CPU died")

    monkeypatch.setattr("refgrid.calibration.run.dealt", ended)
    monkeypatch.setattr("refgrid.calibration.run.choose", lambda *given: choose(*given)[:1])  # a workload an op
    options = ["--op=rmsnorm", "--op=gemm", "--seeds=2", "-n", "1", f"--results={tmp_path}"]

    done = CliRunner().invoke(main, ["calibrate", *options])

    assert done.exit_code == 1
    assert "local.json holds what was measured, --op completes it" in done.output
    assert len(json.loads((tmp_path / "calibration" / "local.json").read_text())["measured"]) > 1


def test_a_budget_that_does_not_suffice_is_a_failure_that_names_the_ops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "refgrid.calibration.run.dealt", lambda *given: dealt(given[0], given[1], given[2], given[3], -1.0)
    )
    options = ["--op=rmsnorm", "--op=gemm", "--seeds=2", "-n", "1", f"--results={tmp_path}"]

    done = CliRunner().invoke(main, ["calibrate", *options, "--budget=90s"])

    assert done.exit_code == 1
    assert "time was up before all of rmsnorm, gemm; " in done.output
    assert "local.json holds what was measured, --op completes it" in done.output


def test_a_budget_is_what_the_dealing_ends_by(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def nothing(*given: Any) -> Iterator[Any]:
        asked.append(given[-1])
        return iter(())

    monkeypatch.setattr("refgrid.calibration.run.dealt", nothing)
    monkeypatch.setattr("refgrid.calibration.run.time", SimpleNamespace(monotonic=lambda: 10.0))

    for plan in (Plan(ROOT, "cpu", 2, ("rmsnorm",)), Plan(ROOT, "cpu", 2, ("rmsnorm",), budget=90)):
        list(measured(plan, here()))

    assert asked == [math.inf, 100.0]


@pytest.mark.usefixtures("errors_alone")
def test_a_whole_measurement_leaves_nothing_of_an_op_that_is_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "calibration" / "local.json"
    file.parent.mkdir()
    environment = {**vars(measure("local", "cpu", Sources().distributions))}
    whole = {**told("later", gemm=2), "environment": environment, "seeds": 2, "absent": {}}
    file.write_text(json.dumps({**told("earlier", gemm=1, gone=1), "environment": environment, "seeds": 2}))
    monkeypatch.setattr("refgrid.calibration.run.measured", lambda *_: iter([("gemm", whole)]))
    options = ["--no-derive", "--seeds=2", f"--results={tmp_path}"]

    done = CliRunner().invoke(main, ["calibrate", *options])

    assert done.exit_code == 0, done.output
    assert json.loads(file.read_text()) == whole


def test_a_data_set_without_a_workload_to_draw_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refgrid.calibration.run.measured", lambda *_: iter(()))

    done = CliRunner().invoke(main, ["calibrate", f"--results={tmp_path}"])

    assert done.exit_code == 2
    assert "has no workload that is small enough" in done.output

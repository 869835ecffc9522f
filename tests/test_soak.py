"""A soak: every case over fresh seeds, apart from evidence, and a report in which no red is lost."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import CPU, H200, case
from projects import TESTS, Project

from refgrid.dataset.case import Case
from refgrid.records.record import Header, Outcome, Run, Verdict, read_runs
from refgrid.report.matrix import build
from refgrid.report.soak import Soak, markdown, soaks, to_dict, upper_bound
from refgrid.running.units import spread

KNOWN = """
[[expected]]
cases = ["double_n4-b1-sum"]
environments = ["*"]
verdict = "mismatch"
reason = "the library doubles twice"
link = "https://example.org/issues/1"
"""
# Right but where the first number of the input is above the bound: what a seed makes of it is known in advance.
WRONG_AT_TIMES = "return x * 2 + (x[:1, :1] > {})"


# ---- the bound


@pytest.mark.parametrize(("events", "trials"), [(0, 1), (0, 10_000), (1, 100), (5, 50), (99, 100)])
def test_at_the_upper_bound_so_few_events_have_one_chance_in_twenty(events: int, trials: int) -> None:
    rate = upper_bound(events, trials)

    chance = math.fsum(math.comb(trials, k) * rate**k * (1 - rate) ** (trials - k) for k in range(events + 1))
    assert chance == pytest.approx(0.05, rel=1e-6)


def test_the_upper_bound_is_three_over_the_trials_without_an_event_and_1_without_a_trial() -> None:
    assert upper_bound(0, 10_000) == pytest.approx(3e-4, rel=2e-3)
    assert upper_bound(7, 7) == upper_bound(0, 0) == 1


# ---- the report of hand-made runs


def seeded(seed: int, source: str = "torch", op: str = "gemm") -> Case:
    return replace(case(source, op), seed=seed)


def outcome(of: Case, verdict: Verdict, *headrooms: float, **hashes: str) -> Outcome:
    told = {"definition": "d1", "reference": "r1", "adapter": "a1", "expected": "none", "tolerance": "table", **hashes}
    return Outcome(of, verdict, "why", tuple({"headroom": each} for each in headrooms), hashes=told)


def run(*outcomes: Outcome, started: str = "2026-11-20", soak: bool = True, **changes: Any) -> Run:
    planned = tuple(each.case for each in outcomes)
    parts = {"instrument": "i1", "memory": "2147483648 B"}
    told = {"environment": CPU, "parts": parts, **changes}
    header = Header(f"run of {started}", started, "0.1.0", planned=planned, soak=soak, **told)
    return Run(header, {each.case.id: each for each in outcomes}, True, Path("x.jsonl"))


def report(*runs: Run) -> Soak:
    (found,) = soaks(runs)
    return found


def test_only_what_ended_green_or_red_is_judged() -> None:
    outcomes = [outcome(seeded(n), verdict) for n, verdict in enumerate(Verdict, 1)]

    found = report(run(*outcomes))

    assert found.planned == len(Verdict)
    assert found.judged == sum(verdict.colour != "yellow" for verdict in Verdict)
    assert {red.verdict for red in found.reds} == {verdict.value for verdict in Verdict if verdict.colour == "red"}


def test_exact_checks_do_not_lower_the_bound_on_false_alarms() -> None:
    numeric = [outcome(seeded(n), Verdict.MATCH) for n in range(1, 11)]
    exact = [outcome(seeded(n, "shape"), Verdict.MATCH) for n in range(1, 91)]

    found = report(run(*numeric, *exact))

    assert (found.judged, found.compared) == (100, 10)
    assert found.rate == upper_bound(0, 10)


def test_the_report_leads_with_what_was_held_to_a_tolerance() -> None:
    numeric = [outcome(seeded(n), Verdict.MISMATCH if n == 1 else Verdict.MATCH) for n in range(1, 11)]
    together = outcome(seeded(1, "agreement"), Verdict.MATCH)
    exact = [outcome(seeded(n, "shape"), Verdict.ERROR) for n in (1, 2)]

    told = [line for line in markdown(report(run(*numeric, together, *exact))).splitlines() if line.startswith("- ")]

    assert told[0] == "- **1 red of 11 case-seeds held to a tolerance** (10 numerics, 1 agreement)"
    assert told[1].startswith("- false alarms: at most 0.36 of these, with 95 % confidence")
    assert told[2] == "- 2 red of 2 held to something exact (2 shape)"
    assert told[3].startswith("- 13 judged of 13 planned: ")


def test_a_red_that_is_green_the_second_time_stays_red() -> None:
    for first, second in ((Verdict.MISMATCH, Verdict.MATCH), (Verdict.MATCH, Verdict.MISMATCH)):
        found = report(
            run(outcome(seeded(1), first)), run(outcome(seeded(1), second), started="2026-11-21"), ordinary()
        )

        assert (found.judged, len(found.reds)) == (1, 1)


def ordinary() -> Run:
    return run(outcome(seeded(0), Verdict.MATCH), soak=False)


def test_what_was_measured_with_another_adapter_or_instrument_is_left_out() -> None:
    red = run(outcome(seeded(1), Verdict.MISMATCH), outcome(seeded(2), Verdict.MATCH))
    mended = run(outcome(seeded(3), Verdict.MATCH, adapter="a2"), started="2026-11-21")
    elsewhere = run(outcome(seeded(3), Verdict.MATCH), started="2026-11-21", parts={"instrument": "i2"})

    for newer in (mended, elsewhere):
        found = report(red, newer)

        assert (found.judged, found.reds, found.older) == (1, (), 2)
    assert report(red).judged == 2


def test_what_had_no_turn_does_not_outdate_what_had() -> None:
    left = Outcome(seeded(2), Verdict.NOT_RUN, "the budget of 30m was spent")

    assert report(run(outcome(seeded(1), Verdict.MATCH), left)).judged == 1


def test_the_report_tells_what_was_judged_as_hashes_and_where_it_changed_in_between() -> None:
    """Of agreement, whose hash is one of all sources, nothing is told: each is held against the reference as well."""
    together = outcome(seeded(1, "agreement"), Verdict.MATCH, adapter="all")
    left = outcome(seeded(1, "cudnn"), Verdict.MISSING, adapter="c1")

    found = report(run(outcome(seeded(1), Verdict.MATCH), together, left))

    assert found.references == {"gemm_n4": "r1"}
    assert found.adapters == {"gemm torch": "a1"}
    assert found.parts["instrument"] == "i1"
    two = run(
        outcome(seeded(1), Verdict.MATCH), outcome(replace(seeded(1), workload="m2"), Verdict.MATCH, adapter="a2")
    )
    assert report(two).adapters == {"gemm torch": "a1 a2"}


def test_the_largest_headroom_of_an_op_names_its_case() -> None:
    outcomes = [outcome(seeded(n), Verdict.MATCH, n / 10, 0.05) for n in (1, 7, 3)]
    exact = outcome(seeded(1, "shape", "rope"), Verdict.MATCH)

    found = report(run(*outcomes, exact))

    assert [(row.op, row.headroom, row.case) for row in found.ops] == [
        ("gemm", 0.7, "gemm_n4-m1-torch-seed7"),
        ("rope", None, ""),
    ]
    assert "| gemm | 3 | 0 | 0.700 | gemm_n4-m1-torch-seed7 |" in markdown(found)


def test_environments_and_machines_are_told_apart() -> None:
    found = soaks([run(outcome(seeded(1), Verdict.MATCH)), run(outcome(seeded(1), Verdict.MATCH), environment=H200)])

    assert [each.environment.title for each in found] == ["cpu on CPU", "cu130 on NVIDIA H200"]


def test_the_commands_are_told_and_a_replay_names_memory_tolerance_and_twin() -> None:
    twin = replace(seeded(7), twin="n 4 -> 2")
    red = outcome(twin, Verdict.MISMATCH, tolerance="0.5")
    red = replace(red, reason="C is off; tolerance set to 0.5 by hand: it's new")

    found = report(run(red, command="pytest --seeds 9"))

    assert found.commands == ("pytest --seeds 9",)
    assert found.reds[0].replay == (
        "pytest tests/references --device cpu --environment cpu --memory 2147483648 --seed 7 --seeds 1"
        " --definition-name gemm_n4 --test-sizes small --tolerance 0.5 --reason 'it'\"'\"'s new' -k m1-torch-seed7"
    )


def test_a_red_of_a_declared_environment_is_replayed_in_its_session() -> None:
    red = run(outcome(seeded(7), Verdict.MISMATCH), environment=H200)

    (found,) = soaks([red], declared={"cu130"})

    assert found.reds[0].replay.startswith("nox -s tests-cu130 -- --memory 2147483648 --seed 7 --seeds 1 ")


def test_an_op_of_which_nothing_was_judged_is_told() -> None:
    found = report(
        run(outcome(seeded(1), Verdict.MATCH, 0.5), outcome(seeded(1, "agreement", "rope"), Verdict.NOT_RUN))
    )

    assert [(row.op, row.judged) for row in found.ops] == [("gemm", 1), ("rope", 0)]
    assert "| rope | 0 | 0 | not judged |  |" in markdown(found)


def test_the_report_is_strict_json() -> None:
    red = outcome(seeded(1), Verdict.MISMATCH, float("inf"))

    told = json.loads(json.dumps(to_dict(report(run(red, outcome(seeded(2), Verdict.MATCH, 0.5)))), allow_nan=False))

    assert told["reds"][0]["seed"] == 1
    assert (told["judged"], told["ops"][0]["red"]) == (2, 1)


def test_a_soak_is_no_evidence_for_the_matrix() -> None:
    assert build([run(outcome(seeded(1), Verdict.MISMATCH)), ordinary()]).exit_code == 0
    assert build([run(outcome(seeded(1), Verdict.MATCH))]).exit_code == 2


# ---- the order


def test_every_family_has_a_seed_before_one_has_two_and_none_is_always_the_last() -> None:
    cases = [seeded(seed, op=op) for op in "abcdefgh" for seed in (1, 2, 3)]

    ordered = sorted(cases, key=spread)

    assert [each.seed for each in ordered] == [1] * 8 + [2] * 8 + [3] * 8
    assert len({ordered[8 * seed + 7].op for seed in range(3)}) > 1


# ---- for real


@pytest.fixture
def project(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Project:
    made = Project(tmp_path, double, write_definition)
    made.reference("return x * 2", 1)
    (tmp_path / "tests" / "references").mkdir(parents=True)
    (tmp_path / "test_double.py").unlink()
    (tmp_path / "tests" / "references" / "test_double.py").write_text(TESTS)
    return made


def soak_runs(project: Project) -> list[Run]:
    return read_runs(project.root / "soak")


def refgrid(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "refgrid", *arguments]
    return subprocess.run(command, cwd=project.root, env=project.variables, capture_output=True, text=True, check=False)


def numerics(run_: Run) -> dict[int, Outcome]:
    return {each.case.seed: each for each in run_.outcomes.values() if each.case.source == "sum"}


def test_seeds_multiply_cases_and_draw_other_inputs(project: Project) -> None:
    done = project.run("--seed", "1", "--seeds", "3")

    (found,) = soak_runs(project)
    assert done.returncode == 0, done.stdout
    assert found.header.soak
    assert found.header.command.endswith("--device cpu --seed 1 --seeds 3")
    assert [each.seed for each in found.header.planned] == [1] * 6 + [2] * 6 + [3] * 6
    assert {"double_n4-b1-sum-seed1", "double_n4-b1-sum-seed3"} <= set(found.outcomes)
    assert len({each.hashes["inputs"] for each in numerics(found).values()}) == 3


def test_a_soak_may_be_of_some_checks_only(project: Project) -> None:
    (project.root / "ci").mkdir()
    other = KNOWN.replace("double_n4-b1-sum", "double_n4-b1-shape")  # matches none of these checks
    (project.root / "ci" / "expected_failures.toml").write_text(other)

    done = refgrid(project, "run-soak", "--seeds=1", "--device=cpu", "--checks", "numerics,agreement")

    (found,) = soak_runs(project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {each.check for each in found.header.planned} == {"numerics", "agreement"}
    assert "0 red of 1 case-seeds held to a tolerance" in done.stdout


def test_a_known_failure_is_known_of_every_seed(project: Project) -> None:
    project.reference("return x * 3", 1)
    (project.root / "ci").mkdir()
    (project.root / "ci" / "expected_failures.toml").write_text(KNOWN)

    project.run("--seed", "1", "--seeds", "2")

    (found,) = soak_runs(project)
    assert {each.verdict for each in numerics(found).values()} == {Verdict.EXPECTED}
    assert len(numerics(found)) == 2


@pytest.mark.parametrize(
    ("reference", "truth", "verdict"),
    [
        pytest.param("return x * 2", "return x * 3", Verdict.EXPECTED, id="the library, as is known"),
        pytest.param("return x * 3", "return x + x", Verdict.MISMATCH, id="the reference"),
    ],
)
def test_a_known_failure_of_a_source_excuses_nobody_else(
    project: Project, reference: str, truth: str, verdict: Verdict
) -> None:
    """Float64 says who is off."""
    project.reference(reference, 1)
    project.truth(double=truth.replace("return ", 'return {"y": ') + "}")
    with (project.root / "provider.py").open("a") as provider:
        provider.write('\ndef referee(op, device):\n    return lambda x: {"y": x.double() * 2}\n')
    (project.root / "ci").mkdir()
    blamed = 'outlier = "sum"\nother_seeds = ["double_n4-b1-sum"]\n'
    (project.root / "ci" / "expected_failures.toml").write_text(KNOWN + blamed)

    project.run("--seed", "1", "--seeds", "2")

    (found,) = soak_runs(project)
    assert [each.verdict for each in numerics(found).values()] == [verdict] * 2


def test_a_soak_runs_all_again_and_leaves_nothing_to_others(project: Project) -> None:
    for _ in range(2):
        project.run("--seeds", "2", "--results", "results/local")
    project.run()

    *both, alone = read_runs(project.root / "results")
    verdicts = [Counter(each.verdict.value for each in found.outcomes.values()) for found in (*both, alone)]
    assert [found.header.soak for found in (*both, alone)] == [True, True, False]
    assert [counts["cached"] for counts in verdicts] == [0, 0, 0]
    assert [counts["match"] for counts in verdicts] == [8, 8, 4]


def test_a_red_seed_is_told_and_replayed_alone_by_the_printed_command(project: Project) -> None:
    project.run("--seed", "1", "--seeds", "8")
    firsts = {seed: first_number(project, seed) for seed in range(1, 9)}
    wrong = max(firsts, key=firsts.__getitem__)
    second = sorted(firsts.values())[-2]
    project.reference(WRONG_AT_TIMES.format((firsts[wrong] + second) / 2), 1)

    project.run("--seed", "1", "--seeds", "8")
    done = refgrid(project, "soak")

    assert done.returncode == 1, done.stdout
    told = json.loads((project.root / "soak/local_on_cpu.json").read_text())
    assert {red["seed"] for red in told["reds"]} == {wrong}
    (red,) = [red for red in told["reds"] if red["case"].endswith(f"-sum-seed{wrong}")]
    assert red["replay"] in done.stdout
    before = len(soak_runs(project))
    replayed = subprocess.run(
        [sys.executable, "-m", *shlex.split(red["replay"])],
        cwd=project.root,
        env=project.variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert replayed.returncode == 1, replayed.stdout
    again = soak_runs(project)[-1] if len(soak_runs(project)) > before else None
    assert again is not None
    assert [each.id for each in again.header.planned] == [red["case"]]
    assert again.outcomes[red["case"]].reason == red["reason"]


def first_number(project: Project, seed: int) -> float:
    """The first number of the input that a seed draws."""
    from refgrid.dataset.definition import load_dataset
    from refgrid.proving.inputs import make_inputs

    dataset = load_dataset(project.root)
    workload = dataset.workloads["double_n4"][0]
    x: Any = make_inputs(dataset.definitions["double_n4"], workload, seed, "cpu", project.root).tensors["x"]
    return float(x[0, 0])


def test_a_soak_goes_on_with_fresh_seeds(project: Project) -> None:
    first = refgrid(project, "run-soak", "--seeds", "3", "tests/references", "--device", "cpu", "-q")
    second = refgrid(project, "run-soak", "--seeds", "1", "tests/references", "--device", "cpu", "-q")

    seeds = [sorted({each.seed for each in found.header.planned}) for found in soak_runs(project)]
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert sorted(seeds) == [[1], [2, 3], [4]]
    assert "Seeds 1 to 4" in second.stdout
    assert "**0 red of 4 case-seeds held to a tolerance**" in second.stdout


def test_a_soak_ends_where_pytest_cannot_run(project: Project) -> None:
    done = refgrid(project, "run-soak", "--seeds", "3", "tests/references", "--definition-name", "no_such")

    assert done.returncode == 1
    assert "pytest ended with 4 at seed 1: the soak ends here" in done.stderr


def test_without_a_judged_case_there_is_no_report(project: Project) -> None:
    done = refgrid(project, "soak")

    assert done.returncode == 2
    assert "soak: holds no soak that has judged a case" in done.stderr


@pytest.mark.parametrize(("option", "value"), [("--seeds", "0"), ("--seeds", "many"), ("--seed", "-1")])
def test_what_is_no_number_of_seeds_is_refused(project: Project, option: str, value: str) -> None:
    done = project.run(option, value)

    assert done.returncode == 4
    assert f"{option} '{value}' should be a whole number from" in done.stderr

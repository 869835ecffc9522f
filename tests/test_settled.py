"""Cached green, in pytest processes of their own: what is unchanged since a match is not run, all else is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from projects import TESTS, TRUTH, Project

from refgrid.records.ledger import Ledger
from refgrid.records.record import Outcome, Run, Verdict, read_runs
from refgrid.report.matrix import build

# A reference that leaves a mark whenever it is called.
MARKING = "open('ran', 'a').write(str(x.shape[0]))\nreturn x * 2"
TWO_WORKERS = ("-n", "2", "--dist", "load", "--max-worker-restart", "10")


@pytest.fixture
def project(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Project:
    made = Project(tmp_path, double, write_definition)
    made.reference(MARKING)
    return made


def runs(project: Project) -> list[Run]:
    return read_runs(project.root / "results")


def newest(project: Project) -> dict[str, str]:
    """Verdicts of the newest run, by what is held against what."""
    return {o.case.id.removeprefix("double_n4-"): o.verdict.value for o in runs(project)[-1].accounted()}


def marks(project: Project) -> str:
    """Which batch sizes the reference was called with since this was asked last."""
    file = project.root / "ran"
    found = file.read_text() if file.exists() else ""
    file.unlink(missing_ok=True)
    return found


def refgrid(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from refgrid.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=project.root, env=project.variables, capture_output=True, text=True, check=False)


def later(project: Project) -> None:
    """Records tell time to the second, and these runs would otherwise be of the same one."""
    for file in (project.root / "results").rglob("*.jsonl"):
        text = file.read_text()
        year = json.loads(text.splitlines()[0])["started"][:4]
        file.write_text(text.replace(f'"started":"{year}', f'"started":"{int(year) - 1}', 1))


@pytest.fixture(scope="session")
def proven_once(
    pristine_double: dict[str, Any],
    writer_below: Callable[[Path], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What a run leaves in which every case has matched that can."""
    root = tmp_path_factory.mktemp("proven")
    made = Project(root, pristine_double, writer_below(root))
    made.reference(MARKING)
    made.run()
    assert set(marks(made)) == {"1", "2"}
    later(made)
    return root


@pytest.fixture
def proven(proven_once: Path, project: Project) -> Project:
    """The same, for one test."""
    shutil.copytree(proven_once, project.root, dirs_exist_ok=True)
    return project


ALL = {f"b{size}-{check}" for size in (1, 2) for check in ("shape", "dtype", "sum", "determinism")}


@pytest.mark.parametrize("workers", [(), TWO_WORKERS], ids=["one process", "two workers"])
def test_what_is_unchanged_since_a_match_is_cached_and_not_run(proven: Project, workers: tuple[str, ...]) -> None:
    (first,) = runs(proven)

    done = proven.run(*workers)

    assert done.returncode == 0, done.stdout + done.stderr
    assert marks(proven) == ""
    assert {name for name, verdict in newest(proven).items() if verdict == "cached"} == ALL
    assert "planned 12 = accounted 12: 4 missing, 8 cached" in done.stdout
    cached = runs(proven)[-1].outcomes["double_n4-b1-sum"]
    assert cached.evidence == first.header.run
    assert cached.reason == f"unchanged since it was match in run {first.header.run} of {first.header.started[:10]}"


@pytest.mark.parametrize("workers", [(), TWO_WORKERS], ids=["one process", "two workers"])
def test_a_selection_plans_and_closes_only_what_it_selects(project: Project, workers: tuple[str, ...]) -> None:
    project.run("-k", "b1")
    marks(project)
    later(project)

    project.run(*workers, "-k", "shape")

    assert newest(project) == {"b1-shape": "cached", "b2-shape": "match"}
    assert marks(project) == "2"


def test_a_cached_case_is_no_evidence_and_the_match_stays_so(project: Project) -> None:
    for _ in range(3):
        project.run("-k", "b1-sum")
        later(project)

    first, *others = runs(project)
    assert [other.outcomes["double_n4-b1-sum"].evidence for other in others] == [first.header.run] * 2


def test_the_matrix_keeps_the_numbers_of_what_is_cached(project: Project) -> None:
    project.reference("return x * 2 + 1e-6", 1)
    project.run()
    (cell,) = (row.cells[0] for row in build(runs(project)).rows if row.against == "sum")
    later(project)
    project.run()

    built = build(runs(project))

    (again,) = (row.cells[0] for row in built.rows if row.against == "sum")
    assert again.counts == {Verdict.CACHED: 1}
    assert (again.colour, again.headroom, again.headroom_case) == ("green", cell.headroom, cell.headroom_case)
    assert again.headroom
    assert again.dates == (runs(project)[0].header.started,) * 2  # when it was measured, not when it was looked up
    assert "6 outcomes not measured again: nothing that counts has changed since" in built.columns[0].notes[0]
    assert built.planned == sum(built.counts.values())


def test_a_cached_case_whose_match_is_gone_proves_nothing(proven: Project) -> None:
    proven.run("-k", "b1-sum")
    first, _ = runs(proven)

    first.file.unlink()

    built = build(runs(proven))
    assert built.counts == {Verdict.NOT_RUN: 1}
    assert "but the records do not have it" in built.reasons[0].text


FAULTS = {
    "mismatch": "return x * 2.1",
    "error": "raise KeyError('k')",
    "oom": "raise MemoryError('4 GiB')",
    "nondeterministic": "run.calls = getattr(run, 'calls', 0) + 1\nreturn x * 2 + (run.calls - 1) * 1e-7",
}


def test_what_failed_is_never_cached(project: Project) -> None:
    (project.root / "test_double.py").write_text(TESTS.replace('"double_n4"', "None"))
    for name, body in FAULTS.items():
        project.reference("open('ran', 'a').write('" + name + " ')\n" + body, 1, name=f"{name}_n4")
    project.truth(**dict.fromkeys(FAULTS, TRUTH))
    project.run()
    red = {outcome.case.id for outcome in runs(project)[-1].accounted() if outcome.verdict.colour == "red"}
    marks(project)
    later(project)

    done = project.run()

    assert done.returncode == 1
    again = runs(project)[-1].outcomes
    assert {again[name].verdict.value for name in red} == set(FAULTS)
    assert set(marks(project).split()) == set(FAULTS)


def test_an_expected_mismatch_is_not_measured_again_until_its_key_changes(project: Project) -> None:
    project.reference("open('ran', 'a').write('x')\nreturn x * 2.1", 1)
    project.expect_mismatch()
    project.run("-k", "sum")
    first = runs(project)[-1]
    later(project)
    marks(project)
    project.run("-k", "sum")
    again = runs(project)[-1].outcomes["double_n4-b1-sum"]
    assert (again.verdict, again.evidence) == (Verdict.EXPECTED, first.header.run)
    assert again.reason == first.outcomes["double_n4-b1-sum"].reason
    assert marks(project) == ""
    later(project)

    project.run("-k", "sum", "--no-cache")
    assert marks(project)
    later(project)
    file = project.root / "ci" / "expected_failures.toml"
    file.write_text(file.read_text().replace("mismatch", "error"))
    project.run("-k", "sum")

    assert newest(project) == {"b1-sum": "mismatch"}


def test_another_expected_failure_is_measured_each_time(project: Project) -> None:
    project.reference("open('ran', 'a').write('x')\nraise MemoryError('4 GiB')", 1)
    project.expect_mismatch()
    file = project.root / "ci" / "expected_failures.toml"
    file.write_text(file.read_text().replace('"mismatch"', '"oom"'))
    project.run("-k", "sum")
    assert newest(project) == {"b1-sum": "expected"}
    later(project)
    marks(project)

    project.run("-k", "sum")

    assert newest(project) == {"b1-sum": "expected"}
    assert marks(project)


def test_a_match_that_has_failed_since_under_the_same_key_is_run_again(project: Project) -> None:
    project.reference("import pathlib\nbad = pathlib.Path('bad').exists()\nreturn x * (3 if bad else 2)", 1)
    project.run("-k", "sum")
    later(project)
    (project.root / "bad").touch()
    project.run("-k", "sum", "--no-cache")
    assert newest(project) == {"b1-sum": "mismatch"}
    later(project)
    (project.root / "bad").unlink()

    project.run("-k", "sum")

    assert newest(project) == {"b1-sum": "match"}


def test_no_cache_runs_everything(proven: Project) -> None:
    proven.run("--no-cache")

    assert Counter(newest(proven).values()) == {"match": 8, "missing": 4}
    assert set(marks(proven)) == {"1", "2"}


def test_a_changed_reference_is_run_again_and_explain_names_it(proven: Project) -> None:
    proven.reference("return x + x")

    done = proven.run("-k", "sum", "--explain")

    assert newest(proven) == {"b1-sum": "match", "b2-sum": "match"}
    assert "double_n4-b1-sum: run, since what counts has changed since it was match in run" in done.stdout
    assert ": reference " in done.stdout
    assert "  torch: " in done.stdout  # the key's parts


def test_a_tolerance_that_its_class_sets_counts(project: Project) -> None:
    tests = project.root / "test_double.py"
    project.run("-k", "sum", *TWO_WORKERS)
    later(project)
    tests.write_text(TESTS + "    tolerance = 0.5\n    tolerance_reason = 'to see'\n")
    project.run("-k", "sum", *TWO_WORKERS)
    assert set(newest(project).values()) == {"match"}
    later(project)

    project.run("-k", "sum", *TWO_WORKERS)

    assert set(newest(project).values()) == {"cached"}


def test_what_was_edited_while_it_ran_is_no_evidence(project: Project) -> None:
    project.reference("open('provider.py', 'a').write('# edited\\n')\nreturn x * 2", 1)
    project.run()
    outcomes = {name.removeprefix("double_n4-b1-"): each for name, each in runs(project)[-1].outcomes.items()}
    assert {name for name, each in outcomes.items() if "key" in each.hashes} == {"shape", "dtype", "determinism"}


def test_what_is_absent_is_told_again_as_what_it_is_until_that_changes(project: Project) -> None:
    project.run("-k", "absent")
    first, reason = runs(project)[-1].header.run, runs(project)[-1].outcomes["double_n4-b1-absent"].reason
    later(project)
    project.run("-k", "absent")
    again = runs(project)[-1].outcomes["double_n4-b1-absent"]
    assert (again.verdict, again.reason, again.evidence) == (Verdict.MISSING, reason, first)
    later(project)

    (project.root / "absent-1.0.dist-info").mkdir()  # it is installed now
    project.run("-k", "absent")

    assert runs(project)[-1].outcomes["double_n4-b1-absent"].evidence == ""


def test_due_counts_what_a_run_would_run_and_records_a_run_of_which_nothing_is(
    project: Project, proven_once: Path
) -> None:
    before = refgrid(project, "due", "test_double.py", "--device", "cpu")
    shutil.copytree(proven_once, project.root, dirs_exist_ok=True)

    after = refgrid(project, "due", "test_double.py", "--device=cpu", *TWO_WORKERS)
    once_more = refgrid(project, "due", "test_double.py", "--device=cpu")

    assert (before.returncode, before.stdout) == (1, "12 of 12 cases are due, such as double_n4-b1-shape\n")
    assert after.returncode == 0, after.stdout + after.stderr
    assert after.stdout.startswith("0 of 12 cases are due; written: ")
    assert "unchanged since their last outcome (--no-cache runs them)" in after.stdout
    assert once_more.returncode == 0
    assert marks(project) == ""
    first, second = runs(project)  # the second such record has taken the place of the first
    assert Counter(outcome.verdict.value for outcome in second.accounted()) == {"cached": 8, "missing": 4}
    assert {outcome.evidence for outcome in second.accounted()} == {first.header.run}
    assert second.finished


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param(["-k", "sum"], "-k: what that leaves over is not known before pytest runs", id="-k"),
        pytest.param(["no/where"], "no/where is no file and no folder", id="no folder"),
        pytest.param(["test_double.py", "--test-sizes", "large"], "no case is planned", id="no case"),
    ],
)
def test_what_only_pytest_can_tell_is_due(project: Project, arguments: list[str], told: str) -> None:
    done = refgrid(project, "due", "--device=cpu", *arguments)

    assert done.returncode == 1
    assert told in done.stdout


def test_due_refuses_a_wrong_value_as_pytest_does(project: Project) -> None:
    done = refgrid(project, "due", "--test-sizes", "tiny")

    assert done.returncode == 2
    assert "legal values: small, medium, large" in done.stderr


def test_explain_shows_the_report_of_a_failure_until_it_is_mended(project: Project) -> None:
    arguments = ("test_double.py", "--device", "cpu")
    project.reference("return x * 3")
    project.run("-k", "sum")
    failed = refgrid(project, "explain", "double_n4-b2-sum", *arguments)
    kept = refgrid(project, "keep", str(runs(project)[0].file))
    runs(project)[0].file.unlink()
    packed = refgrid(project, "explain", "double_n4-b2-sum", *arguments)
    project.reference("return x * 2")
    project.run("-k", "sum")
    mended = refgrid(project, "explain", "double_n4-b2-sum", *arguments)

    assert "double_n4-b2-sum: mismatch: y is off at [" in failed.stdout
    assert "\n    explained by a factor of 1.5\n" in failed.stdout
    assert "\n  replay: pytest " in failed.stdout
    assert kept.returncode == 0, kept.stderr
    assert packed.stdout.endswith(failed.stdout[failed.stdout.index("double_n4-b2-sum: mismatch") :])
    assert "mismatch" not in mended.stdout


def test_explain_tells_one_case_and_names_a_case_that_is_not_planned(project: Project) -> None:
    arguments = ("test_double.py", "--device=cpu")
    run = refgrid(project, "explain", "double_n4-b1-sum", *arguments)
    project.run("-k", "b1-sum")
    cached = refgrid(project, "explain", "double_n4-b1-sum", *arguments)
    stray = refgrid(project, "explain", "double_n4-b9-sum", *arguments)

    assert "double_n4-b1-sum: run, since the records have no match of it with a key" in run.stdout
    assert "double_n4-b1-sum: not run, unchanged since it was match in run" in cached.stdout
    assert "  adapter: " in cached.stdout
    assert stray.returncode == 2
    assert "'double_n4-b9-sum' is none of the 12 cases that this run would plan; near it: " in stray.stderr
    assert "double_n4-b1-sum" in stray.stderr.replace("\n", " ")


def test_a_record_that_cannot_be_read_is_no_evidence(proven: Project) -> None:
    (run,) = runs(proven)
    file = run.file
    file.write_text(file.read_text().replace('"verdict":"match"', '"verdict":"match'))

    done = proven.run("-k", "b1-sum")

    assert "1 match" in done.stdout


def test_a_project_without_a_data_set_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text("def test_plain():\n    pass\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "1"]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "1 passed" in done.stdout


def test_committed_records_are_evidence_too(project: Project) -> None:
    project.run("-k", "b1-sum", "--results", "results/elsewhere")
    project.run("-k", "b1-sum", "--results", "own")

    (run,) = read_runs(project.root / "own")
    assert run.outcomes["double_n4-b1-sum"].verdict is Verdict.CACHED


def test_a_ledger_of_settled_cases_writes_no_more_than_it_must(tmp_path: Path, project: Project) -> None:
    project.run("-k", "b1-shape")
    header = runs(project)[0].header
    ledger = Ledger(tmp_path / "small.jsonl", header)
    ledger.close_case(Outcome(header.planned[0], Verdict.CACHED, "unchanged", hashes={"key": "ab"}, evidence="r"))
    ledger.finish("")

    told = json.loads((tmp_path / "small.jsonl").read_text().splitlines()[1])

    assert set(told) == {"type", "case", "verdict", "reason", "hashes", "evidence"}

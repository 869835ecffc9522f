"""Jobs from nox's list of sessions, and one matrix from the records of those jobs; without a network."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from refgrid.cli import main
from refgrid.dataset.case import Case
from refgrid.environments.ci import (
    HOSTED,
    SELF_HOSTED,
    PlanError,
    labels,
    merge,
    overlays,
    plan_jobs,
    planned_devices,
    to_matrix,
)
from refgrid.environments.declared import EnvironmentSpec
from refgrid.environments.measured import Environment
from refgrid.records.ledger import Ledger
from refgrid.records.record import Header, Outcome, Verdict

CASES = tuple(Case("double_n4", "double", "double", f"b{size}", "shape") for size in (1, 2))
MEASURED = Environment("cu130-a", "cuda", "3.12.3", "linux x86_64", "2.11.0", "13.0", None, "580", "NVIDIA H200", 1, {})


def spec(name: str, **fields: object) -> EnvironmentSpec:
    given = {"name": name, "kind": "venv", "python": "3.12", "pins": ["torch==2.11.0"], "cuda": "13.0"}
    return EnvironmentSpec.model_validate({**given, "origin": "a test", "exclude-newer": "2026-11-20", **fields})


CPU = spec("cpu", cuda=None)
GPU = spec("cu130-a")
OVERLAY = spec("over", kind="overlay", machine=["torch==2.11.0+cu130"], pins=["flashinfer-python==0.6.12"])
DECLARED = {each.name: each for each in (CPU, GPU, OVERLAY)}


def listed(*sessions: str) -> str:
    """What nox --list --json prints, as far as it is read."""
    return json.dumps([{"session": name, "name": name, "tags": [], "call_spec": {}} for name in sessions])


EVERY = listed("tests", "lint", "tests-cpu", "tests-cu130", "tests-cu130-a", "tests-over")


def test_labels_follow_from_the_environment() -> None:
    assert labels(CPU) == HOSTED
    assert labels(GPU) == (*SELF_HOSTED, "cu130")
    assert labels(OVERLAY) == (*SELF_HOSTED, "cu130", "torch-2.11.0-cu130")


def test_each_environment_becomes_one_job_and_other_sessions_none() -> None:
    jobs = plan_jobs(EVERY, DECLARED)

    assert [(job.environment, job.session, job.device) for job in jobs] == [
        ("cpu", "tests-cpu", "cpu"),
        ("cu130-a", "tests-cu130-a", "cuda"),
        ("over", "tests-over", "cuda"),
    ]
    assert json.loads(to_matrix(jobs))["include"][1]["runs-on"] == [*SELF_HOSTED, "cu130"]
    assert [job["overlay"] for job in json.loads(to_matrix(jobs))["include"]] == [False, False, True]
    assert overlays(jobs) == "over"
    assert planned_devices(to_matrix(jobs)) == {"cpu": "cpu", "cu130-a": "cuda", "over": "cuda"}


def test_what_cannot_be_resolved_gets_no_job() -> None:
    assert [job.environment for job in plan_jobs(EVERY, DECLARED, ["over"])] == ["cpu", "cu130-a"]


@pytest.mark.parametrize(
    ("text", "declared", "reason"),
    [
        pytest.param(EVERY, {}, "the plan is empty", id="empty"),
        pytest.param(listed("lint"), DECLARED, "nox lists no session tests-cpu (3 of 3 are missing)", id="no session"),
        pytest.param("nox > Error", DECLARED, "is no list of sessions: 'nox > Error'", id="no JSON"),
        pytest.param('{"session": 1}', DECLARED, "is no list of sessions", id="no list"),
        pytest.param(
            listed(*(f"tests-e{number}" for number in range(257))),
            {f"e{number}": CPU for number in range(257)},
            "the plan has 257 jobs, GitHub takes at most 256",
            id="too many",
        ),
    ],
)
def test_an_unsound_plan_is_refused(text: str, declared: dict[str, EnvironmentSpec], reason: str) -> None:
    with pytest.raises(PlanError, match=re.escape(reason)):
        plan_jobs(text, declared)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"include": [{}]}', '{"include": []}'])
def test_what_is_no_plan_is_not_merged(text: str) -> None:
    with pytest.raises(PlanError, match=r"is no plan|is empty"):
        planned_devices(text)


Upload = Callable[..., Path]


@pytest.fixture
def upload(tmp_path: Path) -> Upload:
    """Leaves the artifact of one job: by default a whole run of two matches on a GPU."""

    def write(name: str = "cu130-a", attempt: int = 1, *, verdicts: str = "match match", **wrong: str) -> Path:
        environment = replace(MEASURED, name=wrong.get("recorded", name), device=wrong.get("device", "cuda"))
        header = Header(f"{name}{attempt}", f"2026-11-2{attempt}T00:00:00+00:00", "0.1.0", environment, CASES)
        folder = tmp_path / "artifacts" / f"records-{name}-{attempt}"
        ledger = Ledger(folder / f"{name}-{attempt}.jsonl", header)
        for case, verdict in zip(CASES, verdicts.split(), strict=False):
            ledger.close_case(Outcome(case, Verdict(verdict)))
        ledger.finish("the run ended before its turn")
        if "killed" in wrong:  # the lines of the cases that it came to are all that it leaves
            lines = ledger.path.read_text().splitlines(keepends=True)
            ledger.path.write_text("".join(lines[: 1 + len(verdicts.split())]))
        return folder

    return write


def merged(tmp_path: Path, *names: str) -> list[str]:
    return merge(dict.fromkeys(names, "cuda"), tmp_path / "artifacts", tmp_path / "merged")


def test_records_of_all_jobs_come_together(tmp_path: Path, upload: Upload) -> None:
    upload("cu130-a")
    upload("cu130-a-2")

    assert merged(tmp_path, "cu130-a", "cu130-a-2") == []
    assert sorted(file.name for file in (tmp_path / "merged").iterdir()) == ["cu130-a-1.jsonl", "cu130-a-2-1.jsonl"]


def test_a_job_that_was_started_again_counts_once(tmp_path: Path, upload: Upload) -> None:
    upload(attempt=9, verdicts="match", killed="yes")
    upload(attempt=10)

    assert merged(tmp_path, "cu130-a") == []
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["cu130-a-10.jsonl"]


def test_records_of_another_environment_on_the_same_runner_stay_out(tmp_path: Path, upload: Upload) -> None:
    folder = upload()
    stray = upload("cu128-old", recorded="cu128-old").joinpath("cu128-old-1.jsonl")
    stray.rename(folder / stray.name)
    stray.parent.rmdir()

    assert merged(tmp_path, "cu130-a") == []
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["cu130-a-1.jsonl"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        pytest.param({"name": "other"}, "cu130-a: there is no artifact records-cu130-a-<attempt>", id="missing"),
        pytest.param({"recorded": "other"}, "cu130-a: records-cu130-a-1 holds no run of it", id="other run"),
        pytest.param({"device": "cpu"}, "ran on cpu, but should have run on cuda", id="no GPU"),
        pytest.param(
            {"verdicts": "match", "killed": "yes"},
            "cu130-a: run cu130-a1 was killed with 1 of 2 planned cases accounted for",
            id="killed",
        ),
    ],
)
def test_a_job_that_did_not_account_for_itself_is_named(
    tmp_path: Path, upload: Upload, wrong: dict[str, str], reason: str
) -> None:
    upload(**wrong)

    assert reason in "\n".join(merged(tmp_path, "cu130-a"))


def test_an_artifact_that_nobody_planned_is_named(tmp_path: Path, upload: Upload) -> None:
    upload()
    upload("other")

    assert merged(tmp_path, "cu130-a") == [f"other: its artifact is in {tmp_path / 'artifacts'}, but nobody planned it"]


def test_unreadable_records_are_named(tmp_path: Path, upload: Upload) -> None:
    file = upload() / "cu130-a-1.jsonl"
    file.write_text(f"{file.read_text()}no record\n\n")

    assert "cu130-a-1.jsonl:5: is no record" in merged(tmp_path, "cu130-a")[0]


def test_the_command_plans_this_projects_own_sessions(tmp_path: Path) -> None:
    output = tmp_path / "output"
    listing = listed("tests-cpu", "tests-cu130-overlay", "tests-cu130-overlay-0.5.3")
    asked = ["ci", "plan", "--environments", "cpu,cu130-overlay,cu130-overlay-0.5.3", "--github-output", str(output)]
    done = CliRunner().invoke(main, [*asked, "-"], input=listing)

    assert done.exit_code == 0, done.output
    told = dict(line.split("=", 1) for line in output.read_text().splitlines())
    assert planned_devices(told["plan"]) == {"cpu": "cpu", "cu130-overlay": "cuda", "cu130-overlay-0.5.3": "cuda"}
    assert told["overlays"].split() == ["cu130-overlay-0.5.3", "cu130-overlay"]


def test_the_command_refuses_an_environment_that_does_not_exist() -> None:
    done = CliRunner().invoke(main, ["ci", "plan", "--environments", "cu999", "-"], input=EVERY)

    assert done.exit_code == 2
    assert "no environment is called 'cu999'; legal values: cpu, " in done.output


@pytest.mark.parametrize(
    ("verdicts", "planned", "status"),
    [
        pytest.param("match match", ["cu130-a"], 0, id="green"),
        pytest.param("match mismatch", ["cu130-a"], 1, id="red"),
        pytest.param("not-run missing", ["cu130-a"], 2, id="nothing proven"),
        pytest.param("match match", ["cu130-a", "gone"], 1, id="a job without records"),
    ],
)
def test_the_merged_matrix_decides(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    upload: Upload,
    verdicts: str,
    planned: list[str],
    status: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    upload(verdicts=verdicts)
    plan = json.dumps({"include": [{"environment": name, "device": "cuda"} for name in planned]})

    done = CliRunner().invoke(
        main, ["ci", "merge", "--plan", plan, "--artifacts", "artifacts", "--summary", "summary.md"]
    )

    assert done.exit_code == status, done.output
    summary = (tmp_path / "summary.md").read_text()
    assert "# Compatibility matrix" in summary
    assert ("- ✗ gone: there is no artifact" in summary) == ("gone" in planned)


def test_without_a_plan_nothing_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    done = CliRunner().invoke(main, ["ci", "merge", "--plan", "", "--artifacts", "artifacts"])

    assert done.exit_code == 2
    assert "is no plan: ''" in done.output

"""The workflows as text, and the hook of self-hosted runners as a program: who can start what on machines of ours.

`nox -s lint` checks their schema and has them audited; here stands what only this project knows.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from refgrid.environments.ci import Job, plan_jobs, to_matrix
from refgrid.environments.declared import load_environments

ROOT = Path(__file__).resolve().parents[1]
HOOK = ROOT / "ci" / "hooks" / "job-started.sh"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
GPU = (ROOT / ".github" / "workflows" / "gpu.yml").read_text()

_PINNED = re.compile(r"uses: [\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+")


def unpinned(workflow: str) -> list[str]:
    """Actions that are not pinned by a full hash with the release beside it."""
    used = (line.strip().removeprefix("- ") for line in workflow.splitlines() if "uses:" in line)
    return [line for line in used if not _PINNED.fullmatch(line)]


def expressions_in_commands(workflow: str) -> list[str]:
    """Commands into which text from outside would be pasted before the shell reads them."""
    return [line for line in commands(workflow) if "${{" in line]


def commands(workflow: str) -> Iterator[str]:
    """What is run, line by line; a block is refused, so that nothing hides in one."""
    for line in workflow.splitlines():
        if found := re.match(r"\s*(?:- )?run: (.+)", line):
            assert found[1][0] not in "|>", f"{line.strip()}: one command a step"
            yield found[1]


def triggers(workflow: str) -> set[str]:
    """The events that start a workflow."""
    block = re.search(r"^on:\n((?:  .*\n|\n)+)", workflow, re.MULTILINE)
    assert block, "the workflow has no block of events"
    return set(re.findall(r"^  (\w+):", block[1], re.MULTILINE))


def unlimited(workflow: str) -> list[str]:
    """Jobs without a limit of time."""
    jobs = re.split(r"^  (\w[\w-]*):\n", workflow.partition("\njobs:\n")[2], flags=re.MULTILINE)[1:]
    return [name for name, job in zip(jobs[::2], jobs[1::2], strict=True) if "timeout-minutes:" not in job]


def steps(workflow: str, job: str) -> list[str]:
    """The text of each step of a job."""
    found = re.search(rf"^  {job}:\n((?:    .*\n|\n)*)", workflow, re.MULTILINE)
    return re.split(r"^      - ", found[1], flags=re.MULTILINE)[1:] if found else []


def told(among: list[str], action: str, field: str) -> str:
    """A field of the first step that does this; nothing without one."""
    step = next((step for step in among if action in step), "")
    found = re.search(rf"^ +{field}: (\S+)", step, re.MULTILINE)
    return found[1] if found else ""


def without_wheels(workflow: str, jobs: list[Job]) -> list[str]:
    """Planned sessions that would end in "no wheelhouse is here"."""
    made, prove = steps(workflow, "wheelhouse"), steps(workflow, "prove")
    own = next(number for number, step in enumerate(prove) if '--session "${SESSION}"' in step)
    fetch, upload = [step for step in prove[:own] if "actions/download-artifact@" in step], "actions/upload-artifact@"
    served = (
        "nox --session wheelhouse -- ${OVERLAYS}" in list(commands("\n".join(f"- {step}" for step in made)))
        and told(made, upload, "path") == "wheelhouse"  # where the command writes, unless it is told otherwise
        and told(made, upload, "name") == told(fetch, "", "name") != ""
        and told(fetch, "", "path") == told([prove[own]], "", "REFGRID_WHEELHOUSE") != ""
        and told(fetch, "", "if") == "matrix.overlay"
    )
    return [] if served else [job.session for job in jobs if job.overlay]


def allowed_events() -> set[str]:
    listed = re.search(r"ALLOWED=\((.*)\)", HOOK.read_text())
    assert listed
    return set(listed[1].split())


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_a_workflow_is_pinned_limited_and_pastes_nothing(file: Path) -> None:
    text = file.read_text()

    assert unpinned(text) == []
    assert unlimited(text) == []
    assert expressions_in_commands(text) == []
    assert "pull_request_target" not in triggers(text)
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")


def test_nobody_from_outside_starts_a_job_on_a_machine_of_ours() -> None:
    assert triggers(GPU) == allowed_events() == {"schedule", "workflow_dispatch"}
    for file in WORKFLOWS:
        runners = set(re.findall(r"^    runs-on: (.+)$", file.read_text(), re.MULTILINE))
        assert runners - {"ubuntu-24.04"} == ({"${{ matrix.runs-on }}"} if file.stem == "gpu" else set())


def test_every_job_runs_the_one_commit_that_was_asked_for() -> None:
    assert GPU.count("ref: ${{ inputs.commit || github.sha }}") == GPU.count("actions/checkout@") == 4


def test_records_outlive_a_red_run_and_are_merged_whatever_happened() -> None:
    (upload,) = (step for step in steps(GPU, "prove") if "actions/upload-artifact@" in step)

    assert upload.splitlines()[1].strip().startswith("if: always()")
    assert "name: records-${{ matrix.environment }}-${{ github.run_attempt }}" in upload
    assert "if: always() && needs.plan.result != 'skipped'" in GPU
    assert "cancel-in-progress: false" in GPU
    assert "fail-fast: false" in GPU


def test_steps_are_the_commands_that_a_person_types() -> None:
    known = re.compile(r"(\.ci/venv/bin/)?(python3?|nox) |\.ci/run$|cat results/local/matrix\.md |'\[\[ |git clean ")

    for file in WORKFLOWS:
        assert [line for line in commands(file.read_text()) if not known.match(line)] == []
    assert '.ci/venv/bin/nox --session "${SESSION}"' in list(commands(GPU))


def planned() -> list[Job]:
    declared = load_environments(ROOT / "ci" / "environments.toml")
    return plan_jobs(json.dumps([{"session": f"tests-{name}"} for name in declared]), declared)


def test_every_planned_session_finds_what_it_needs() -> None:
    jobs = planned()

    assert without_wheels(GPU, jobs) == []
    assert [job.session for job in jobs if job.overlay]
    assert '"overlay": true' in to_matrix(jobs)  # what the condition of a step reads
    assert "if: ${{ !cancelled() && needs.plan.result == 'success' }}" in GPU  # the others need no wheels


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        pytest.param("nox --session wheelhouse -- ${OVERLAYS}", "nox --session lint", id="not made"),
        pytest.param(
            "          path: wheelhouse\n          if-no", "          path: wheels\n          if-no", id="not sent"
        ),
        pytest.param("if: matrix.overlay", "if: matrix.overlays", id="not fetched"),
        pytest.param(
            "REFGRID_WHEELHOUSE: wheelhouse", "REFGRID_WHEELHOUSE: /srv/wheelhouse", id="looked for elsewhere"
        ),
    ],
)
def test_an_overlay_without_its_wheels_is_noticed(there: str, instead: str) -> None:
    assert GPU.count(there) == 1

    missing = without_wheels(GPU.replace(there, instead), planned())

    assert missing
    assert all(session.startswith("tests-cu130-overlay") for session in missing)


def test_what_was_installed_and_compiled_stays_on_a_runner_and_its_records_go(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path)]
    ignored = (ROOT / ".gitignore").read_text()
    subprocess.run([*git, "init", "--quiet"], check=True)
    (tmp_path / ".gitignore").write_text(ignored)
    subprocess.run([*git, "add", ".gitignore"], check=True)
    caches, stale = (
        [".nox/.cache/kernels/a.so", ".ci/venv/bin/nox"],
        ["results/local/a.jsonl", "wheelhouse/a", "src/a.py"],
    )
    for name in (*caches, *stale):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (clean,) = (command for command in commands(GPU) if command.startswith("git clean "))

    subprocess.run([*git, *clean.split()[1:]], check=True, capture_output=True)

    assert told(steps(GPU, "prove"), "actions/checkout@", "clean") == "false"
    assert [name for name in (*caches, *stale) if (tmp_path / name).exists()] == caches


def test_what_compiles_is_compiled_before_anything_is_leased() -> None:
    run = [command for command in commands(GPU) if "/nox " in command]

    assert run == ['.ci/venv/bin/nox --session warm -- "${ENVIRONMENT}"', '.ci/venv/bin/nox --session "${SESSION}"']
    (warm,) = (step for step in steps(GPU, "prove") if "--session warm" in step)
    assert "continue-on-error: true" in warm  # what cannot be installed ends in the records, by the session after it


@pytest.mark.parametrize(
    ("line", "found"),
    [
        pytest.param("      - uses: actions/checkout@v6", ["uses: actions/checkout@v6"], id="tag"),
        pytest.param(f"      - uses: a/b@{'0' * 40}", [f"uses: a/b@{'0' * 40}"], id="release not named"),
        pytest.param(f"      - uses: a/b@{'0' * 40} # v1.2.3", [], id="pinned"),
    ],
)
def test_an_unpinned_action_is_noticed(line: str, found: list[str]) -> None:
    assert unpinned(line) == found


def test_an_expression_in_a_command_and_a_job_without_a_limit_are_noticed() -> None:
    assert expressions_in_commands("      - run: echo ${{ github.event.pull_request.title }}")
    assert unlimited("on:\n\njobs:\n  a:\n    timeout-minutes: 1\n  b:\n    steps:\n") == ["b"]
    with pytest.raises(AssertionError, match="one command a step"):
        list(commands("      - run: |\n          echo"))


def job_started(**variables: str) -> subprocess.CompletedProcess[str]:
    told = {"PATH": os.environ["PATH"], **variables}
    return subprocess.run([str(HOOK)], env=told, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("event", sorted(allowed_events()))
def test_the_hook_lets_jobs_of_the_project_start(event: str) -> None:
    assert job_started(GITHUB_EVENT_NAME=event).returncode == 0


@pytest.mark.parametrize(
    "event", ["pull_request", "pull_request_target", "issue_comment", "push", "", "*", "schedule workflow_dispatch"]
)
def test_the_hook_refuses_every_other_event_and_names_it(event: str) -> None:
    refused = job_started(GITHUB_EVENT_NAME=event)

    assert refused.returncode == 1
    named = subprocess.run(["bash", "-c", 'printf %q "$1"', "-", event], capture_output=True, text=True, check=True)
    assert f"this runner refuses the job: its event is {named.stdout}, but" in refused.stderr
    assert "should be one of: schedule workflow_dispatch" in refused.stderr


def test_the_hook_refuses_a_job_whose_event_it_cannot_know() -> None:
    assert job_started().returncode == 1


def test_the_hook_is_sound_bash() -> None:
    text = HOOK.read_text()

    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert HOOK.stat().st_mode & 0o111, f"{HOOK} is not executable"

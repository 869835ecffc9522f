"""The workflows as text, and the hook of self-hosted runners as a program: who can start what on machines of ours.

`nox -s lint` checks their schema and has them audited; here stands what only this project knows.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

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
    assert GPU.count("ref: ${{ inputs.commit || github.sha }}") == GPU.count("actions/checkout@") == 3


def test_records_outlive_a_red_run_and_are_merged_whatever_happened() -> None:
    upload = GPU[GPU.index("actions/upload-artifact@") :]

    assert upload.splitlines()[1].strip().startswith("if: always()")
    assert "name: records-${{ matrix.environment }}-${{ github.run_attempt }}" in upload
    assert "if: always() && needs.plan.result != 'skipped'" in GPU
    assert "cancel-in-progress: false" in GPU
    assert "fail-fast: false" in GPU


def test_steps_are_the_commands_that_a_person_types() -> None:
    known = re.compile(r"(\.ci/venv/bin/)?(python3?|nox) |\.ci/run$|cat results/local/matrix\.md |'\[\[ ")

    for file in WORKFLOWS:
        assert [line for line in commands(file.read_text()) if not known.match(line)] == []
    assert '.ci/venv/bin/nox --session "${SESSION}"' in list(commands(GPU))


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

#!/usr/bin/env bash
# Refuses jobs of events that people from outside can cause. Every runner of ours starts this before each job: copy it to
# where no job can write, and name it in the runner's .env as ACTIONS_RUNNER_HOOK_JOB_STARTED. A pull request may rewrite
# the workflow that it runs; this file is out of its reach.
set -euo pipefail

readonly ALLOWED=(schedule workflow_dispatch)

for event in "${ALLOWED[@]}"; do
  if [[ "${GITHUB_EVENT_NAME:-}" == "${event}" ]]; then
    exit 0
  fi
done

printf 'this runner refuses the job: its event is %q, but should be one of: %s\n' \
  "${GITHUB_EVENT_NAME:-}" "${ALLOWED[*]}" >&2
exit 1

"""Outcomes that a run took from another, since nothing had changed: read with the numbers that were measured there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from refgrid.records.record import Outcome, Run, Verdict


def with_evidence(runs: Sequence[Run]) -> list[Run]:
    """The runs with their evidence filled in; what was taken from a run that is not here proves nothing."""
    by_name = {run.header.run: run for run in runs}
    return [_filled(run, by_name) for run in runs]


def measured_at(outcome: Outcome, run: Run, runs: Mapping[str, Run]) -> str:
    """When the numbers of an outcome were measured: the start of the run that did."""
    return runs[outcome.evidence].header.started if outcome.evidence in runs else run.header.started


def _filled(run: Run, runs: Mapping[str, Run]) -> Run:
    if not any(outcome.evidence for outcome in run.outcomes.values()):
        return run
    return replace(run, outcomes={name: _with_numbers(each, runs) for name, each in run.outcomes.items()})


def _with_numbers(outcome: Outcome, runs: Mapping[str, Run]) -> Outcome:
    if not outcome.evidence:
        return outcome
    source = runs.get(outcome.evidence)
    found = source.outcomes.get(outcome.case.id) if source else None
    wanted = Verdict.MATCH if outcome.verdict is Verdict.CACHED else outcome.verdict
    if found is None or found.verdict is not wanted or found.evidence:
        reason = f"{outcome.reason or outcome.verdict.value}, but the records do not have it: nothing is proven"
        return Outcome(outcome.case, Verdict.NOT_RUN, reason)
    return replace(found, verdict=outcome.verdict, evidence=outcome.evidence)

"""Which outcomes stand of the runs of one environment on one kind of machine.

The newest run wins, case by case. A run that did not plan a case, or ended before its turn, replaces nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from refgrid.dataset.case import Case
from refgrid.dataset.smaller import told_changes
from refgrid.environments.measured import Environment
from refgrid.records.carried import measured_at, with_evidence
from refgrid.records.record import BY_HAND, Outcome, Run, Verdict


@dataclass(frozen=True)
class Standing:
    """An outcome that no newer run has replaced, the run it is of, and the start of the run that measured it."""

    outcome: Outcome
    run: Run
    measured: str


@dataclass(frozen=True)
class History:
    """The runs of one environment on one kind of machine; `environment` is that of the newest run with a result.

    `standing` is in planned order. `planned` counts the cases that the headers of the runs owe, whatever became of
    them. `notes` say where older outcomes stand, `findings` what is odd about where the newest run ran.
    """

    title: str
    environment: Environment
    standing: tuple[Standing, ...]
    runs: tuple[Run, ...]
    planned: int
    notes: tuple[str, ...]
    findings: tuple[str, ...]


def span(standing: Sequence[Standing]) -> tuple[str, str] | None:
    """Oldest and newest start of the runs that measured real outcomes."""
    started = {entry.measured for entry in standing if _real(entry.outcome)}
    return (min(started), max(started)) if started else None


def histories(runs: Sequence[Run]) -> list[History]:
    """One for each environment and machine kind with records, by title; soaks are no evidence."""
    titles: dict[str, list[Run]] = {}
    proving = [run for run in runs if not run.header.soak]
    for run in sorted(with_evidence(proving), key=lambda run: run.header.started):
        titles.setdefault(run.header.environment.title, []).append(run)
    by_name = {run.header.run: run for run in proving}
    return [_history(title, titles[title], by_name) for title in sorted(titles)]


def _history(title: str, runs: Sequence[Run], by_name: Mapping[str, Run]) -> History:
    standing: dict[str, Standing] = {}
    planned: Counter[str] = Counter()
    replaced: set[str] = set()
    for run in runs:
        # A case that one header names twice stays two in the union; it ends once, so the sums will differ.
        planned |= Counter(case.id for case in run.header.planned)
        for outcome in run.accounted():
            before = standing.get(outcome.case.id)
            if before is None or _real(outcome) or not _real(before.outcome):
                standing[outcome.case.id] = Standing(outcome, run, measured_at(outcome, run, by_name))
        replaced |= _drop_other_file(standing, run)
    replaced -= set(standing)
    owed = sum(count for case_id, count in planned.items() if case_id not in replaced)
    newest = _newest(runs, standing)
    notes = tuple(_notes(runs, newest, standing, replaced))
    stand = tuple(standing.values())
    return History(title, newest.header.environment, stand, tuple(runs), owed, notes, newest.findings)


def _real(outcome: Outcome) -> bool:
    return outcome.verdict is not Verdict.NOT_RUN


def _ran(case: Case, run: Run) -> bool:
    outcome = run.outcomes.get(case.id)
    return outcome is not None and _real(outcome)


def _drop_other_file(standing: dict[str, Standing], run: Run) -> set[str]:
    """A definition that was broken and is no longer, or the other way round, is another file: its past goes.

    Otherwise the error of a file that was mended years ago would stay in the matrix for ever.
    """
    older = [(case_id, entry.outcome.case) for case_id, entry in standing.items() if entry.run is not run]
    if not older:
        return set()
    ran = (case for case in run.header.planned if _ran(case, run))
    broken = {case.definition: case.check == "definition" for case in ran}
    was_broken = {case_id: case.check == "definition" for case_id, case in older}
    gone = {name for name, case in older if broken.get(case.definition, was_broken[name]) != was_broken[name]}
    for case_id in gone:
        del standing[case_id]
    return gone


def _newest(runs: Sequence[Run], standing: Mapping[str, Standing]) -> Run:
    with_result = {id(entry.run) for entry in standing.values() if _real(entry.outcome)}
    return next((run for run in reversed(runs) if id(run) in with_result), runs[-1])


def _notes(runs: Sequence[Run], newest: Run, standing: Mapping[str, Standing], gone: set[str]) -> Iterator[str]:
    texts = _texts(standing)
    for run in runs:
        if not run.header.planned:
            yield f"{_name(run)} planned no case and replaces nothing"
        yield from _unfinished(run, standing)
        if run is not newest:
            yield from _older(run, standing, newest, texts)
    carried = [entry for entry in standing.values() if entry.outcome.evidence]
    if carried:
        days = " to ".join(sorted({date[:10] for date in span(carried) or ()})) or "it was not run"
        yield f"{_count(len(carried), 'outcome')} not measured again: nothing that counts has changed since {days}"
    by_hand = sum(BY_HAND.partition("{}")[0] in entry.outcome.reason for entry in standing.values())
    if by_hand:
        yield f"{_count(by_hand, 'outcome')} under a tolerance set by hand, not the table's"
    shrunk = [entry.outcome for entry in standing.values() if entry.outcome.shrunk]
    if shrunk:
        example = f"{shrunk[0].case.id}: {told_changes(shrunk[0].shrunk)}"
        yield f"{_count(len(shrunk), 'outcome')} at sizes cut to fit into memory, such as {example}"
    if gone:
        left_out = _count(len(gone), "older outcome")
        yield f"{left_out} left out: the definition's file was broken since, or has been mended"


def _unfinished(run: Run, standing: Mapping[str, Standing]) -> Iterator[str]:
    """Cases that the run owed and did not run, unless a newer run has made up for them."""
    not_run = (case.id for case in run.header.planned if not _ran(case, run))
    lost = [standing[case_id] for case_id in not_run if case_id in standing]
    still = sum(entry.run is run for entry in lost)
    kept = sum(entry.run.header.started < run.header.started for entry in lost)
    if still or kept:
        told = f"{_name(run)} left {still + kept} of {len(run.header.planned)} cases not-run"
        yield told + (f"; {kept} keep the outcome of an older run" if kept else "")


def _older(run: Run, standing: Mapping[str, Standing], newest: Run, texts: Mapping[str, str]) -> Iterator[str]:
    """What stands of an older run, and what has changed since, such as the texts of references."""
    kept = [entry for entry in standing.values() if entry.run is run and _real(entry.outcome)]
    if not kept or run.header.started > newest.header.started:
        return
    before = list(_changes(run.header.environment, newest.header.environment))
    ran = ((e.outcome.hashes.get("reference"), texts.get(e.outcome.case.definition)) for e in kept)
    other = sum(text is not None and text != newest_text for text, newest_text in ran)
    stand = f"{_count(len(kept), 'outcome')} of {_name(run)} stand, no newer run has them"
    stand += f", measured with {' and '.join(before)}" if before else ""
    yield stand + (f", {other} of them with another text of the reference" if other else "")
    yield from (f"{_name(run)}: {finding}" for finding in run.findings if finding not in newest.findings)


def _texts(standing: Mapping[str, Standing]) -> dict[str, str]:
    """Hash of the reference text that the newest outcome of each definition ran."""
    by_age = sorted(standing.values(), key=lambda entry: entry.run.header.started)
    hashes = ((entry.outcome.case.definition, entry.outcome.hashes.get("reference")) for entry in by_age)
    return {definition: text for definition, text in hashes if text}


def _changes(old: Environment, new: Environment) -> Iterator[str]:
    """What the older environment had where the newer one differs."""
    for each in fields(Environment):
        before, after = getattr(old, each.name), getattr(new, each.name)
        if isinstance(before, dict):
            for library in sorted({*before, *after}):
                if before.get(library) != after.get(library):
                    yield f"{library} {before.get(library) or 'missing'}"
        elif before != after:
            yield f"{each.name} {before or 'missing'}"


def _name(run: Run) -> str:
    return f"run {run.header.run} of {run.header.started[:10]}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")

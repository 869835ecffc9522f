"""Why a case is run or not: the parts of its key, and which of them differ from those of its newest match."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from refgrid.caching.evidence import Evidence, newest_match
from refgrid.caching.key import Keys, differing
from refgrid.dataset.case import Case
from refgrid.records.record import RecordError, Run, record_bytes, runs_of

# So many cases are told one by one, with their own parts; of more, those with the same reason are counted.
_ONE_BY_ONE = 12


def explained(
    cases: Mapping[str, Case],
    tolerances: Mapping[str, str],
    found: Mapping[str, Evidence],
    keys: Keys,
    records: list[Path],
) -> Iterator[str]:
    """Lines for a reader; `found` is what stands already, by case id."""
    yield "key: parts of all cases"
    yield from (f"  {name}: {value}" for name, value in keys.run_parts.items())
    matches = newest_match(records, tolerances.keys() - found.keys())
    why = {name: _why(name, cases, tolerances, found, keys, matches) for name in tolerances}
    if len(why) > _ONE_BY_ONE:
        yield from _grouped(why)
        return
    for name, told in why.items():
        yield f"{name}: {told}"
        yield f"  key: {keys.key(cases[name], tolerances[name])}"
        yield from (f"  {part}: {value}" for part, value in keys.parts(cases[name], tolerances[name]).items())


def failure(case_id: str, records: Iterable[Path]) -> Iterator[str]:
    """The report of a case's newest outcome, if that is a failure; a file that cannot be read is named."""
    runs: list[Run] = []
    for file in records:
        try:
            runs += runs_of(file) if case_id.encode() in record_bytes(file) else ()
        except (OSError, RecordError) as error:
            yield f"left out: {error}"
    runs.sort(key=lambda run: run.header.started)
    newest = next((run.outcomes[case_id] for run in reversed(runs) if case_id in run.outcomes), None)
    if newest and newest.report:
        yield f"{case_id}: {newest.verdict.value}: {newest.reason}"
        yield from (f"  {line}" for line in newest.report.splitlines())


def _why(
    name: str, cases: Mapping[str, Case], tolerances: Mapping[str, str], found: Mapping[str, Evidence], keys: Keys,
    matches: Mapping[str, Evidence],
) -> str:  # fmt: skip
    if evidence := found.get(name):
        return f"not run, unchanged since it was {_told(evidence)}"
    if (match := matches.get(name)) is None:
        return "run, since the records have no match of it with a key"
    changes = differing(match.parts, {**keys.run_parts, **keys.parts(cases[name], tolerances[name])})
    if changes:
        return f"run, since what counts has changed since it was {_told(match)}: {'; '.join(changes)}"
    return f"run: nothing has changed since it was {_told(match)}, but a newer outcome is none, or it was cut to fit"


def _told(evidence: Evidence) -> str:
    return f"{evidence.verdict.value} in run {evidence.run} of {evidence.started[:10]}"


def _grouped(why: Mapping[str, str]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for name, told in why.items():
        groups.setdefault(told, []).append(name)
    for told, names in sorted(groups.items(), key=lambda group: -len(group[1])):
        yield f"{_count(names)}: {told} (e.g. {names[0]})"


def _count(names: Iterable[str]) -> str:
    number = len(list(names))
    return f"{number} case" + ("" if number == 1 else "s")

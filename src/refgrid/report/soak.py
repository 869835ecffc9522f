"""The report of a soak: how often a right reference was called wrong over fresh seeds, as far as that can be known.

A red of a soak is a false alarm or a fault, and which of them is for somebody to find out; until then it counts.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records.record import BY_HAND, Outcome, Run, Verdict, verdict_counts

CONFIDENCE = 0.95

# What an outcome was measured with, of its case: where one of these has changed, it is of another case.
_PARTS = ("definition", "reference", "adapter", "expected", "tolerance")
# Checks that hold numbers against a tolerance; the others are exact, so a seed tells less about them.
_COMPARED = ("numerics", "agreement")


@dataclass(frozen=True)
class Red:
    """A case and seed that did not match, and the command that runs it alone."""

    case: str
    seed: int
    verdict: str
    reason: str
    replay: str


@dataclass(frozen=True)
class OpRow:
    """One op that was planned: how many case-seeds were judged, and the largest headroom with the case that has it."""

    op: str
    judged: int
    red: int
    headroom: float | None
    case: str


@dataclass(frozen=True)
class Soak:
    """What the soaks of one environment and machine kind add up to.

    `judged` case-seeds ended green or red; of these `compared` were held to a tolerance, of which `compared_red` are
    red. `rate` is the share of these that are red at most, with 95 % confidence. `older` outcomes were left out: what
    they measured has changed. `references`, by definition, and `adapters`, by op and source, are hashes of what was
    judged, to tell later what has changed; those of the instrument and its tolerances are among the `parts`.
    """

    environment: Environment
    parts: Mapping[str, str]
    runs: tuple[str, ...]
    dates: tuple[str, str]
    seeds: tuple[int, int]
    cases: int
    planned: int
    judged: int
    compared: int
    compared_red: int
    rate: float
    verdicts: Mapping[str, int]
    checks: Mapping[str, int]
    ops: tuple[OpRow, ...]
    reds: tuple[Red, ...]
    older: int
    commands: tuple[str, ...]
    references: Mapping[str, str]
    adapters: Mapping[str, str]


def soaks(runs: Iterable[Run], declared: Collection[str] = ()) -> list[Soak]:
    """One report for each environment and machine kind with a soak among the runs, by title.

    Environments that are `declared` are prepared by their sessions, so that reds of them are replayed there.
    """
    titles: dict[str, list[Run]] = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.header.started):
        if run.header.soak:
            titles[run.header.environment.title].append(run)
    return [_soak(titles[title], declared) for title in sorted(titles)]


def upper_bound(events: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """The largest rate at which so few events are not yet too unlikely (Clopper-Pearson); about 3 / trials for none."""
    if events >= trials:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(events, trials, middle) > 1 - confidence else (low, middle)
    return high


def replay(outcome: Outcome, environment: Environment, parts: Mapping[str, str], *, session: bool) -> str:
    """The command that runs one case and seed alone, where the records are no evidence either."""
    case = outcome.case
    bytes_given = re.fullmatch(r"(\d+) B", parts.get("memory", ""))
    name = case.id.removeprefix(case.definition).removeprefix("~twin").removeprefix("-")
    told = [
        *(["--memory", bytes_given[1]] if bytes_given else []),
        *("--seed", str(case.seed), "--seeds", "1", "--definition-name", case.definition, "--test-sizes", case.size),
        *_by_hand(outcome),
        *("-k", name),
    ]
    here = ["--device", environment.device, "--environment", environment.name]
    start = ["nox", "-s", f"tests-{environment.name}", "--"] if session else ["pytest", "tests/references", *here]
    return shlex.join([*start, *told])


def _by_hand(outcome: Outcome) -> Iterator[str]:
    """The tolerance in place of the table's, with the reason that the outcome carries for it."""
    tolerance = outcome.hashes.get("tolerance", "table")
    if tolerance != "table":
        yield from ("--tolerance", tolerance)
        _, _, reason = outcome.reason.partition(f"{BY_HAND.format(tolerance)}: ")
        yield from ("--reason", reason) if reason else ()


def markdown(soak: Soak) -> str:
    """The report to be read."""
    return "\n".join(_lines(soak)) + "\n"


def to_dict(soak: Soak) -> dict[str, Any]:
    """The same as plain data, for strict JSON."""
    ops = [{**asdict(row), "headroom": _plain(row.headroom)} for row in soak.ops]
    return {**asdict(soak), "ops": ops, "reds": [asdict(red) for red in soak.reds]}


def _soak(runs: Sequence[Run], declared: Collection[str]) -> Soak:
    newest = runs[-1].header
    alike = [run for run in runs if run.header.parts == newest.parts]
    standing, older = _standing(alike)
    judged = [each for each in standing if each.verdict.colour != "yellow"]
    compared = [each for each in judged if each.case.check in _COMPARED]
    wrong = sum(each.verdict.colour == "red" for each in compared)
    reds = [each for each in judged if each.verdict.colour == "red"]
    seeds = [each.case.seed for each in judged] or [case.seed for case in newest.planned]
    return Soak(
        environment=newest.environment,
        parts=newest.parts,
        runs=tuple(run.header.run for run in alike),
        dates=(alike[0].header.started, newest.started),
        seeds=(min(seeds), max(seeds)),
        cases=len({case.name for run in alike for case in run.header.planned}),
        planned=len({case.id for run in alike for case in run.header.planned}),
        judged=len(judged),
        compared=len(compared),
        compared_red=wrong,
        rate=upper_bound(wrong, len(compared)),
        verdicts={verdict.value: count for verdict, count in verdict_counts(standing).items()},
        checks=dict(Counter(each.case.check for each in judged)),
        ops=tuple(_rows(standing)),
        reds=tuple(_red(each, newest.environment, newest.parts, declared) for each in reds),
        older=older + sum(len(run.outcomes) for run in runs if run not in alike),
        commands=tuple(dict.fromkeys(run.header.command for run in alike)),
        references=_hashes("reference", judged, lambda case: case.definition),
        adapters=_hashes("adapter", (each for each in judged if each.case.source), lambda c: f"{c.op} {c.source}"),
    )


def _standing(runs: Sequence[Run]) -> tuple[list[Outcome], int]:
    """One outcome a case and seed, and how many were left out as older ones.

    Where the same was run twice the worse one stands, so that nothing can be repeated until it is green.
    """
    outcomes = [outcome for run in runs for outcome in run.accounted()]
    newest = {each.case.name: _measured(each) for each in outcomes if each.verdict is not Verdict.NOT_RUN}
    today = [each for each in outcomes if each.verdict is Verdict.NOT_RUN or _measured(each) == newest[each.case.name]]
    rank = {verdict: place for place, verdict in enumerate(_worst_first())}
    standing: dict[str, Outcome] = {}
    for each in today:
        before = standing.setdefault(each.case.id, each)
        standing[each.case.id] = min(before, each, key=lambda outcome: rank[outcome.verdict])
    return list(standing.values()), len(outcomes) - len(today)


def _worst_first() -> list[Verdict]:
    """Red, then green, then what proves nothing."""
    return [verdict for colour in ("red", "green", "yellow") for verdict in Verdict if verdict.colour == colour]


def _measured(outcome: Outcome) -> tuple[str | None, ...]:
    return tuple(outcome.hashes.get(part) for part in _PARTS)


def _hashes(part: str, judged: Iterable[Outcome], of: Callable[[Case], str]) -> dict[str, str]:
    """What was judged, as hashes; all of them where it changed from one case to another, which are the hash of none."""
    found: dict[str, set[str]] = defaultdict(set)
    for outcome in judged:
        found[of(outcome.case)].add(outcome.hashes.get(part, ""))
    return {name: " ".join(sorted(hashes)) for name, hashes in found.items()}


def _rows(standing: Sequence[Outcome]) -> Iterator[OpRow]:
    """Of every op that was planned: of one with nothing judged nothing is known."""
    by_op: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in standing:
        by_op[outcome.case.op].append(outcome)
    for op in sorted(by_op):
        worst = max(_headrooms(by_op[op]), default=(None, ""))
        colours = Counter(each.verdict.colour for each in by_op[op])
        yield OpRow(op, len(by_op[op]) - colours["yellow"], colours["red"], *worst)


def _headrooms(outcomes: Iterable[Outcome]) -> Iterator[tuple[float, str]]:
    """Of outcomes that match: a red one is told apart."""
    for outcome in outcomes:
        for comparison in outcome.comparisons if outcome.verdict is Verdict.MATCH else ():
            if comparison.get("headroom") is not None:
                yield float(comparison["headroom"]), outcome.case.id


def _red(outcome: Outcome, environment: Environment, parts: Mapping[str, str], declared: Collection[str]) -> Red:
    told = replay(outcome, environment, parts, session=environment.name in declared)
    return Red(outcome.case.id, outcome.case.seed, outcome.verdict.value, outcome.reason, told)


def _at_most(events: int, trials: int, rate: float) -> float:
    """The probability of so many events or fewer."""
    return math.fsum(
        math.exp(
            math.lgamma(trials + 1)
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * math.log(rate)
            + (trials - k) * math.log1p(-rate)
        )
        for k in range(events + 1)
    )


def _plain(headroom: float | None) -> float | str | None:
    return headroom if headroom is None or math.isfinite(headroom) else str(headroom)


def _lines(soak: Soak) -> Iterator[str]:
    environment = soak.environment
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(environment.libraries.items()))
    yield f"# Soak of {environment.title}"
    yield ""
    yield f"Seeds {soak.seeds[0]} to {soak.seeds[1]} of {soak.cases} cases, {_days(soak)}, {libraries}."
    yield ""
    yield from _counts(soak)
    if soak.older:
        yield f"- {soak.older} older outcomes are left out: what they measured has changed since"
    yield from ("", "```console", *(f"$ {command}" for command in soak.commands), "```", "")
    yield from ("| op | judged | red | largest headroom | case |", "|---|---|---|---|---|")
    for row in soak.ops:
        used = f"{row.headroom:.3f}" if row.headroom is not None else "exact" if row.judged else "not judged"
        yield f"| {row.op} | {row.judged} | {row.red} | {used} | {row.case} |"
    if soak.reds:
        yield from ("", "## Reds", "")
        for each in soak.reds:
            yield from (f"- `{each.case}`: {each.verdict}: {each.reason}", f"  `{each.replay}`")


def _counts(soak: Soak) -> Iterator[str]:
    """What was held to a tolerance first: only there can a right reference be called wrong by a seed."""
    held = {check: count for check, count in soak.checks.items() if check in _COMPARED}
    exact = {check: count for check, count in soak.checks.items() if check not in _COMPARED}
    red = sum(row.red for row in soak.ops) - soak.compared_red
    yield f"- **{soak.compared_red} red of {soak.compared} case-seeds held to a tolerance** ({_told(held)})"
    yield f"- false alarms: at most {soak.rate:.2g} of these, with 95 % confidence"
    yield f"- {red} red of {soak.judged - soak.compared} held to something exact ({_told(exact)})"
    yield f"- {soak.judged} judged of {soak.planned} planned: {_told(soak.verdicts)}"


def _days(soak: Soak) -> str:
    return " to ".join(dict.fromkeys(date[:10] for date in soak.dates))


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing"

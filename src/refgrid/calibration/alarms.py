"""What random tokens have in place of an error: how often a right sampler is called wrong, and a wrong one right.

The evidence against a sampler is a likelihood ratio E, see refgrid.proving.likelihood, so that min(1, 1 / E) is a
p-value: of a right sampler it is at most a in a share a of cases, or fewer. That is proven; here it is measured, over
cases drawn from the law itself, with how often samplers that are off by what a comparison says it finds are found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

LEVELS = (0.5, 0.1, 0.01, 1e-3)
LEAST_SEEDS = 200
CHANCE = 1e-6  # of a count that is called too large or too small where it is neither

_HEAD = """
# Random samples: false alarms and power

A sample has no error from float64. In its place, of cases drawn from the law that float64 gives for a workload: the
share whose p-value is at most p. It may not exceed p; it may be less, as the p-value is the inverse of a likelihood
ratio and no quantile. *Most* is the most evidence of all cases, in nats, of the {bound:.3g} that make a case red: false
alarms stay below {rate:g} a case. *Found* are cases drawn from laws that are wrong by what a comparison of so many
draws says it finds with a probability of {power:g}; where nothing stands, so few draws find nothing that is near. Draws
are as many as a CPU takes. The tests do not depend on a device, so that there are no rows of GPUs.

Measured in {name} (torch {torch}), {date}, with {seeds} seeds.

| op | law of | against | draws x rows | cases | {levels} | most | found |
|{rule}|
"""


def unsound(record: Mapping[str, Any]) -> list[str]:
    """What a right test would not have given, in words: p-values that are too small too often, faults not found."""
    found = [] if record["seeds"] >= LEAST_SEEDS else [f"{record['seeds']} seeds, but should be {LEAST_SEEDS}"]
    for row in record["measured"]:
        what = f"{row['op']}, {row['law']}, against {row['against']}"
        found += [f"{what}: {told}" for told in (*_too_often(row, record), *_too_seldom(row, record))]
    return found


def _too_often(row: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    counts = [(float(level), count) for level, count in row["at_most"].items()]
    if sorted(level for level, _ in counts) != sorted(LEVELS):
        yield f"p-values are counted at {sorted(row['at_most'])}, but should be at {LEVELS}"
    cases = row["cases"]
    for level, count in [*counts, (math.exp(-record["bound"]), row["red"])]:
        if at_least(count, cases, level) < CHANCE:
            yield f"p is at most {level:.3g} in {count} of {cases} cases, but should be in a share of {level:.3g}"


def _too_seldom(row: Mapping[str, Any], record: Mapping[str, Any]) -> Iterator[str]:
    for fault in row["found"]:
        cases, count, power = fault["cases"], fault["found"], record["power"]
        if at_least(cases - count, cases, 1 - power) < CHANCE:
            yield f"{_fault(fault)} is found in {count} of {cases} cases, but should be in a share of {power:g}"


def at_least(count: int, cases: int, share: float) -> float:
    """The probability of so many successes or more in independent cases, each with the probability `share`."""
    logs = (
        math.lgamma(cases + 1)
        - math.lgamma(k + 1)
        - math.lgamma(cases - k + 1)
        + k * math.log(share)
        + (cases - k) * math.log1p(-share)
        for k in range(count, cases + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a table each; empty without any."""
    return "".join(part for record in records for part in _told(record))


def _told(record: Mapping[str, Any]) -> Iterator[str]:
    environment = record["environment"]
    yield _HEAD.format(
        **{name: record[name] for name in ("seeds", "bound", "rate", "power")},
        **{name: environment[name] for name in ("name", "torch")},
        date=record["date"][:10],
        levels=" | ".join(f"p = {level:g}" for level in LEVELS),
        rule="|".join(["---"] * (7 + len(LEVELS))),
    )
    yield from map(_row, record["measured"])


def _row(row: Mapping[str, Any]) -> str:
    shares = [f"{row['at_most'][f'{level:g}'] / row['cases']:.2g}" for level in LEVELS]
    drawn = (row["law"], row["against"], f"{row['draws']} x {row['rows']}", row["cases"])
    cells = (row["op"], *drawn, *shares, f"{row['nats'][-1]:.3g}", _faults(row["found"]))
    return f"| {' | '.join(map(str, cells))} |\n"


def _faults(found: Iterable[Mapping[str, Any]]) -> str:
    return "; ".join(f"{_fault(each)} in {each['found']} of {each['cases']}" for each in found)


def _fault(fault: Mapping[str, Any]) -> str:
    return f"{fault['fault'].replace('_', ' ')} {fault['by']:g}"

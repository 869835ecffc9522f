"""Truths that match in committed records and have no derived row: each needs a reason that somebody has written.

Such a truth is held to what stands in tolerance.toml, so one that was never drawn would keep a limit by hand unseen.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refgrid.calibration.derive import Row
from refgrid.calibration.evidence import comparisons
from refgrid.dataset.definition import DataSet
from refgrid.records.record import Run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_suffix(".toml")

Key = tuple[str, str, str]  # truth, op, output


@dataclass(frozen=True)
class Exemption:
    """Why some truths have no row."""

    truths: Sequence[str]
    ops: Sequence[str]
    outputs: Sequence[str]
    reason: str

    @property
    def keys(self) -> set[Key]:
        """Each that it is of."""
        return {(truth, op, output) for truth in self.truths for op in self.ops for output in self.outputs}


@cache
def exemptions() -> tuple[Exemption, ...]:
    """Those of underived.toml."""
    return tuple(Exemption(**entry) for entry in tomllib.loads(FILE.read_text(encoding="utf-8"))["underived"])


def matched(runs: Iterable[Run], dataset: DataSet) -> set[Key]:
    """What was compared as numbers, and matched."""
    return {
        (f"{outcome.case.source} on {run.header.environment.device}", outcome.case.op, output)
        for run in runs
        for outcome, output, _, _ in comparisons(run, dataset)
        if outcome.case.source and outcome.verdict.value == "match"
    }


def unstated(rows: Iterable[Row], matches: Iterable[Key]) -> Iterator[str]:
    """Matches without a row or a reason, in words."""
    stated = {key for each in exemptions() for key in each.keys}
    for truth, op, output in sorted(set(matches) - _keys(rows) - stated):
        yield (
            f"{truth}, {op}, {output}: matches in committed records but has no derived row; "
            f"draw it with refgrid calibrate --op {op}, or say in {FILE.name} why none follows"
        )


def outdated(rows: Iterable[Row], matches: Collection[Key]) -> list[Key]:
    """What underived.toml gives a reason for though there is a row, or no match."""
    stated = {key for each in exemptions() for key in each.keys}
    return sorted(stated & _keys(rows) | stated - set(matches))


def _keys(rows: Iterable[Row]) -> set[Key]:
    return {(row.truth, row.op, row.output) for row in rows}

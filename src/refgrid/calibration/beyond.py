"""Rows of truths that are further from float64 than the three-way bound: each needs a reason that somebody has written.

Such a row is wider than that of a truth which keeps the bound, so a worse library would get a looser row unasked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from refgrid.calibration.derive import Row
from refgrid.proving.tolerance import TRUTH_LIMITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Reason:
    """Why some truths are further off, up to which error from float64."""

    truths: Sequence[str]
    op: str
    dtype: str
    outputs: Sequence[str]
    error: float
    reason: str

    def fits(self, row: Row) -> bool:
        """Whether it is of that row, whatever its error."""
        return row.truth in self.truths and row.output in self.outputs and (row.op, row.dtype) == (self.op, self.dtype)


@cache
def reasons() -> tuple[Reason, ...]:
    """Those of beyond.toml."""
    return tuple(Reason(**entry) for entry in tomllib.loads(FILE.read_text(encoding="utf-8"))["beyond"])


def why(row: Row) -> str | None:
    """What explains the error of a row: the reason, else what the truth's own limit was measured by."""
    written = [each.reason for each in reasons() if each.fits(row) and (row.error or 0.0) <= each.error]
    limits = [each.measured for each in TRUTH_LIMITS if each.fits(row.truth, row.op, row.dtype, row.output)]
    return next(iter([*written, *limits]), None)


def unexplained(rows: Iterable[Row]) -> Iterator[str]:
    """Rows beyond the bound that nothing explains, in words."""
    for row in rows:
        if not row.keeps_three_way and why(row) is None:
            known = [each.error for each in reasons() if each.fits(row)]
            stands = f"the entry stands for {known[0]:g}" if known else "there is no entry"
            yield (
                f"{row.truth}, {row.op}, {row.output} ({row.dtype}): is {row.error:g} from float64 but should be at "
                f"most {row.three_way:g}, or have its reason in {FILE.name}: {stands}"
            )

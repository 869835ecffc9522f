"""What calibration found, for people: every row with what it follows from, and every party's error from float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from refgrid.calibration import alarms, growth
from refgrid.calibration.beyond import why
from refgrid.calibration.derive import Row
from refgrid.calibration.joined import ENOUGH
from refgrid.calibration.left_out import left_out
from refgrid.calibration.rounding import FLOAT64, REFERENCE, UNIT
from refgrid.dataset.definition import DataSet

_SUMMED = ("K", "hidden_size", "intermediate_size")  # axes whose length is that of the op's sums

_HEAD = """# Calibration

Written by `nox -s calibrate`. A row holds for one truth, output and dtype. *Needed* is by how much, beside rtol, the
reference and the truth differ at most; *allowed before* is what the source documents' table, or the truth's own limit,
gives. *Three-way* is twice the error of the same formula in the library's dtype, the most that a library's error may
be; an error in **bold** exceeds it. *Row* is the error of a row over its norm, needed and allowed. Where no error from
float64 is given, the row follows from committed records, which prove it. Of chosen indices the scores are meant that
they were chosen by. Of random samples there is no row: *Random samples* below has what they are held to.

{tighter} of {all} rows are tighter than before.

| op | output | truth | needed | atol, rtol | allowed before | error from float64 | three-way | row | from |
|---|---|---|---|---|---|---|---|---|---|
"""

_ERRORS = """
## {name}: {machine}, {libraries}

{date}, {seeds}, dealt to its workloads; what a definition holds constant is the same in all draws. Of each
draw the largest error; of the draws the 50th, 90th, 99th and 100th percentile, absolute. Then, at most: what exceeds
the rounding of the dtype, the relative error, and the error of a row over its norm.

| op | output | who, from float64 | absolute | beyond rounding | relative | row |
|---|---|---|---|---|---|---|
"""

_SUMS = """
A sum of K products in float32 is off by less than sqrt(K) 2^-24 of its row's norm where each addition is rounded, and
by a multiple of K where bits are cut off: *Rows and the length of sums*, the last part, measures both. That is far
below what rounding the output adds, so bounds of rows do not depend on K.

| op | K | sqrt(K) 2^-24 | a row of the reference, at most | rounding of the output |
|---|---|---|---|---|
"""


def report(
    measurements: Sequence[Mapping[str, Any]],
    rows: Sequence[Row],
    dataset: DataSet,
    samples: Sequence[Mapping[str, Any]] = (),
    sums: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Markdown: the rows of the table first, then each environment's errors and what no row follows from.

    At last what samples have in place of an error, and how errors grow with the length of sums.
    """
    tighter = sum(row.atol < row.allowed for row in rows)
    parts = [_HEAD.format(tighter=tighter, all=len(rows))]
    ordered = sorted(rows, key=lambda row: (row.op, row.output, row.truth))
    parts += [*map(_row, ordered), *_beyond(ordered)]
    for measurement in measurements:
        parts += _measurement(measurement)
        parts += _few(measurement)
        parts += _left_out(measurement, dataset)
    parts += [alarms.section(samples), growth.section(sums)]
    return "".join(parts)


def _row(row: Row) -> str:
    error = "" if row.error is None else f"{row.error:.2g}"
    told = [
        row.op,
        f"{row.output} ({row.dtype})",
        row.truth,
        f"{row.needed:.2g}",
        f"{row.atol:g}, {row.rtol:.3g}",
        f"{row.allowed:g}",
        error if row.keeps_three_way else f"**{error}**",
        "" if row.three_way is None else f"{row.three_way:.2g}",
        "" if row.row_norm is None else f"{row.row_needed:.2g} of {row.row_norm:g}",
        row.provenance,
    ]
    return _line(told)


def _beyond(rows: Iterable[Row]) -> Iterator[str]:
    found = [row for row in rows if not row.keeps_three_way]
    if found:
        yield "\nBeyond the three-way bound, and why:\n\n"
    for row in found:
        times = f"{row.error / row.three_way:.3g} times" if row.error and row.three_way else "more than nothing"
        yield f"- {row.op}, {row.output} ({row.dtype}), {row.truth}, {times}: {why(row) or 'no reason is written'}\n"


def _measurement(measurement: Mapping[str, Any]) -> Iterator[str]:
    environment = measurement["environment"]
    yield _ERRORS.format(
        name=environment["name"],
        machine=environment["gpu"] or environment["device"],
        libraries=", ".join(f"{name} {version}" for name, version in environment["libraries"].items()),
        date=measurement["date"][:10],
        seeds=_seeds(measurement),
    )
    yield from (_party(row) for row in measurement["measured"] if row["against"] == FLOAT64)
    yield _SUMS
    yield from _sums(measurement)


def _seeds(measurement: Mapping[str, Any]) -> str:
    others = [f"{count} of {op}" for op, count in measurement.get("seeds_of", {}).items()]
    return f"{measurement['seeds']} seeds an op" + "".join(f", {told}" for told in others)


def _few(measurement: Mapping[str, Any]) -> Iterator[str]:
    rows = (row for row in measurement["measured"] if row["against"] == FLOAT64 and row["draws"] < ENOUGH)
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        found[row["op"], row["who"]] = min(row["draws"], found.get((row["op"], row["who"]), ENOUGH))
    if found:
        yield f"\nFewer than {ENOUGH} draws, as some of the workloads were refused:\n\n"
    yield from (f"- {op}, {who}: {draws}\n" for (op, who), draws in sorted(found.items()))


def _left_out(measurement: Mapping[str, Any], dataset: DataSet) -> Iterator[str]:
    found = left_out(measurement, dataset)
    if found:
        yield "\nNo row follows from these draws:\n\n"
    yield from (f"- {op}, {truth}: {why}\n" for (op, truth), why in sorted(found.items()))


def _party(row: Mapping[str, Any]) -> str:
    absolute = " ".join(f"{value:.2g}" for value in row["abs"])
    largest = [f"{row[name][-1]:.2g}" if row[name] else "" for name in ("beyond_rounding", "rel", "row")]
    return _line([row["op"], f"{row['output']} ({row['dtype']})", row["who"], absolute, *largest])


def _sums(measurement: Mapping[str, Any]) -> Iterator[str]:
    for row in measurement["measured"]:
        longest = max(_lengths(row["op"], measurement["workloads"]), default=0)
        if row["who"] == REFERENCE and row["against"] == FLOAT64 and row["row"] and longest:
            grown, rounding = math.sqrt(longest) * UNIT["float32"], UNIT[row["dtype"]]
            yield _line([row["op"], longest, f"{grown:.2g}", f"{row['row'][-1]:.2g}", f"{rounding:.2g}"])


def _lengths(op: str, workloads: Mapping[str, Mapping[str, int]]) -> Iterable[int]:
    mine = (axes for case, axes in workloads.items() if case.startswith(f"{op}_"))
    return (axes[name] for axes in mine for name in _SUMMED if name in axes)


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |\n"

"""How the error of a row, relative to its norm, grows with the length K of the sums in it: what is told and demanded.

The table of tolerances bounds rows by one number for all K. That is right as long as what an output's rounding adds,
which does not grow, is far above what its sums add, which does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from refgrid.calibration.rounding import REFERENCE, UNIT

AS_HERE = "its float32 sums, not rounded"
ONE_BY_ONE = "the same, product after product"
CUT_OFF = "the same, 16 products at a time, cut off"
SUMS = (AS_HERE, ONE_BY_ONE, CUT_OFF)

FLAT = 0.05  # power of K below which nothing grows
PART = 0.25  # of the rounding, which sums may add at most: 3 % of both together

_Line: TypeAlias = dict[int, Sequence[float]]  # by K, the percentiles of the furthest row of each draw
_Key: TypeAlias = tuple[str, str, str]  # op, dtype, and what was measured

_HEAD = """
# Rows and the length of sums

Measured in {name} (torch {torch}), {date}, {seeds} draws of each: the error from float64 of the furthest row over its
norm, median and largest of the draws. *Grows as* is the power of K that fits the medians. The oracle is float64 rounded
once, so that its row is what rounding the output alone is worth. Inputs are drawn as those of workloads; K of the
mixture of experts is its hidden_size.

- Outputs of 16 bits do not grow with K, and no row is off by more than one rounding of its dtype: one bound of a row's
  norm for all K is right for them, and a factor sqrt(K) in it would let errors of up to sqrt(K) roundings pass.
- What the float32 sums add stays below sqrt(K) 2^-24 where each addition is rounded: the second table has it over that.
  Of products one after the other it is a share that stays, or, as products of bfloat16 have 16 bits and short sums of
  them lose nothing, rises to one that does; blocks of a CPU add ever less than that.
- Where what exceeds 24 bits is cut off, a model of Tensor Cores, each error is towards 0 and they grow as K. Of
  rounding that is {parts} at the largest K, and as much as rounding
  {equals}.
"""


def unsound(record: Mapping[str, Any]) -> list[str]:
    """What contradicts that rows need one bound for all K, in words."""
    lines = _lines(record)
    return [f"{', '.join(key)}: {told}" for key in lines for told in (*_grows(key, lines[key]), *_too_far(key, lines))]


def _grows(key: _Key, line: _Line) -> Iterator[str]:
    power = exponent(line)
    if key[2] not in SUMS and power > FLAT:
        yield f"grows as K^{power:.2f}, but should not grow: as K^{FLAT:g} at most"


def _too_far(key: _Key, lines: Mapping[_Key, _Line]) -> Iterator[str]:
    for k, row in lines[key].items():
        most = _most(key, k, lines)
        if not row[-1] <= most:
            yield f"a row is off by {row[-1]:.3g} at K = {k}, but should be by {most:.3g} at most"


def _most(key: _Key, k: int, lines: Mapping[_Key, _Line]) -> float:
    """Of sums that are rounded sqrt(K) 2^-24, of those that are cut off a part of the rounding of the output."""
    op, dtype, what = key
    if what in (AS_HERE, ONE_BY_ONE):
        return _unit(k)
    return PART * lines[op, dtype, REFERENCE][k][0] if what == CUT_OFF else UNIT[dtype]


def exponent(line: _Line) -> float:
    """The power of K that fits the medians best, by least squares of their logarithms."""
    xs, ys = [math.log(k) for k in line], [math.log(row[0]) for row in line.values()]
    x, y = math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    return math.fsum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / math.fsum((a - x) ** 2 for a in xs)


def _lines(record: Mapping[str, Any]) -> dict[_Key, _Line]:
    found: dict[_Key, _Line] = defaultdict(dict)
    for row in record["measured"]:
        found[row["op"], row["dtype"], row["what"]][row["K"]] = row["row"]
    return dict(found)


def section(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was measured, and what it says; empty without any."""
    return "".join(part for record in records for part in _told(record))


def _told(record: Mapping[str, Any]) -> Iterator[str]:
    environment, lines = record["environment"], _lines(record)
    named = {"name": environment["name"], "torch": environment["torch"]}
    parts, equals = _beside_rounding(lines)
    yield _HEAD.format(**named, date=record["date"][:10], seeds=record["seeds"], parts=parts, equals=equals)
    yield from _table(lines, lambda row, _: f"{row[0]:.2g} {row[-1]:.2g}")
    of_sums = {key: line for key, line in lines.items() if key[2] in SUMS}
    yield from _table(of_sums, lambda row, k: f"{row[0] / _unit(k):.2g} {row[-1] / _unit(k):.2g}")


def _beside_rounding(lines: Mapping[_Key, _Line]) -> tuple[str, str]:
    """What is cut off at the largest K, over the rounding of each dtype, and the K at which the two are alike."""
    parts, equals = [], []
    for (op, dtype, what), line in lines.items():
        if what == CUT_OFF:
            k = max(line)
            part = line[k][0] / lines[op, dtype, REFERENCE][k][0]
            parts.append(f"{part:.3g} ({dtype})")
            equals.append(f"at K = {round(k / part, -4):,.0f} ({dtype})")
    return " and ".join(parts), " and ".join(equals)


def _unit(k: int) -> float:
    return math.sqrt(k) * UNIT["float32"]


def _table(lines: Mapping[_Key, _Line], cell: Any) -> Iterator[str]:
    lengths = sorted({k for line in lines.values() for k in line})
    yield f"\n| op | what | {' | '.join(f'K = {k}' for k in lengths)} | grows as |\n{'|---' * (len(lengths) + 3)}|\n"
    for (op, dtype, what), line in lines.items():
        cells = [cell(line[k], k) if k in line else "" for k in lengths]
        yield f"| {op} ({dtype}) | {what} | {' | '.join(cells)} | K^{exponent(line):.2f} |\n"

"""Some ops measured anew: what a measurement holds of the others stays, if it is of the same environment.

`seeds` is how many draws there are of each op, `seeds_of` of those that were measured anew with another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from refgrid.calibration.broken import op_of_case
from refgrid.environments.measured import Environment

_MAY_DIFFER = {"gpu_count"}
ENOUGH = 200  # draws of a truth


class OtherEnvironment(ValueError):
    """A measurement cannot be completed here: names what differs, and how."""


def demand_same(earlier: Mapping[str, Any], environment: Environment, seeds: int) -> None:
    """Raises OtherEnvironment unless versions and GPU are the same, and seeds enough or no fewer than there were."""
    then, now = earlier["environment"], asdict(environment)
    differ = [name for name in now if name not in _MAY_DIFFER and then.get(name) != now[name]]
    if differ:
        told = "; ".join(f"{name} was {then.get(name)}, and is {now[name]}" for name in differ)
        raise OtherEnvironment(f"the other ops were measured elsewhere: {told}. Measure all ops, without --op")
    if seeds < min(least := earlier["seeds"], ENOUGH):
        raise OtherEnvironment(f"seeds = {seeds}, but should be at least {min(least, ENOUGH)}: the others have {least}")


def in_order(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of what was measured, by op, output and who it is of."""
    return sorted(rows, key=lambda row: [row[name] for name in ("op", "dtype", "output", "who", "against")])


def joined(found: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, and of the earlier measurement what is of other ops; the date is that of the oldest."""
    anew = {row["op"] for row in found["measured"]}
    ops = anew | {row["op"] for row in earlier["measured"]}
    rows = [row for row in earlier["measured"] if row["op"] not in anew]
    cases = {case: axes for case, axes in earlier["workloads"].items() if op_of_case(case, ops) not in anew}
    absent = {
        where: told
        for where, told in earlier["absent"].items()
        if op_of_case(where.partition(", ")[2], ops) not in anew
    }
    kept = {row["op"] for row in rows}
    seeds = earlier["seeds"] if rows else found["seeds"]
    counts = {op: count for op, count in earlier.get("seeds_of", {}).items() if op in kept}
    counts.update({op: found["seeds"] for op in sorted(anew) if found["seeds"] != seeds})
    return {
        **found,
        "seeds": seeds,
        **({"seeds_of": counts} if counts else {}),
        "date": earlier["date"] if rows else found["date"],
        "workloads": {**cases, **found["workloads"]},
        "measured": in_order([*rows, *found["measured"]]),
        "absent": dict(sorted({**absent, **found["absent"]}.items())),
    }

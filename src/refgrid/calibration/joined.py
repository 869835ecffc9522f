"""Some ops measured anew: what a measurement holds of the others stays, if it is of the same environment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from refgrid.calibration.broken import op_of_case
from refgrid.environments.measured import Environment

_MAY_DIFFER = {"gpu_count"}


class OtherEnvironment(ValueError):
    """A measurement cannot be completed here: names what differs, and how."""


def demand_same(earlier: Mapping[str, Any], environment: Environment, seeds: int) -> None:
    """Raises OtherEnvironment unless the measurement has as many seeds, and the environment's versions and GPU."""
    then, now = {**earlier["environment"], "seeds": earlier["seeds"]}, {**asdict(environment), "seeds": seeds}
    differ = [name for name in now if name not in _MAY_DIFFER and then.get(name) != now[name]]
    if differ:
        told = "; ".join(f"{name} was {then.get(name)}, and is {now[name]}" for name in differ)
        raise OtherEnvironment(f"the other ops were measured elsewhere: {told}. Measure all ops, without --op")


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
    return {
        **found,
        "date": earlier["date"] if rows else found["date"],
        "workloads": {**cases, **found["workloads"]},
        "measured": in_order([*rows, *found["measured"]]),
        "absent": dict(sorted({**absent, **found["absent"]}.items())),
    }

"""Sources that broke while they were measured: what follows from such a measurement lacks some of their draws, or all.

One that is missing or refuses a size has said so itself, and stays in the measurement alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from refgrid.records.record import Verdict

ADVICE = (
    "A source that breaks has no row in the table, or one of fewer draws. Mend what the reason names: the library, its "
    "adapter, or this machine; what the library cannot do, the adapter refuses with a verdict and a reason. Then run "
    "refgrid calibrate again."
)


def broken(measurement: Mapping[str, Any]) -> list[str]:
    """A line for each source and op with a call that ended in a red verdict: how many, and why."""
    red: dict[tuple[str, str], list[str]] = defaultdict(list)
    ops = {row["op"] for row in measurement["measured"]}
    for place, told in measurement["absent"].items():
        source, _, case = place.partition(", ")
        if Verdict(told.partition(":")[0]).colour == "red":
            red[source, op_of_case(case, ops)].append(f"{case}: {told}")
    name = measurement["environment"]["name"]
    return [
        f"{source}, {op} ({name}): gave nothing in {_draws(len(found))}, such as {found[0]}"
        for (source, op), found in sorted(red.items())
    ]


def op_of_case(case: str, ops: Iterable[str]) -> str:
    """As `op_of` finds it: the longest that begins the definition's name, and so the case's."""
    return max((op for op in ops if case.startswith((f"{op}_", f"{op}-"))), key=len, default=case)


def _draws(count: int) -> str:
    return "1 draw" if count == 1 else f"{count} draws"

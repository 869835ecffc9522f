"""How a case that did not match is told: the finding itself, and the verdict that an exception stands for."""

from __future__ import annotations

import traceback
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from refgrid.dataset.definition import DefinitionError
from refgrid.records.record import Verdict

if TYPE_CHECKING:
    from refgrid.proving.compare import Comparison


class Finding(AssertionError):
    """A case did not match: its verdict, the reason in one line, what was measured, and a report of several lines.

    `outliers` are the sides of which float64 says that they are the ones that are off, by the names of their sources.
    """

    def __init__(
        self,
        verdict: Verdict,
        reason: str,
        comparisons: Sequence[Comparison] = (),
        report: str = "",
        outliers: Collection[str] = (),
    ) -> None:
        super().__init__(reason)
        self.verdict, self.reason, self.comparisons, self.report = verdict, reason, tuple(comparisons), report
        self.outliers = frozenset(outliers)


def judge(error: BaseException) -> tuple[Verdict, str]:
    """The verdict and the reason that an exception stands for; an exception nobody planned is an `error`."""
    told = getattr(error, "verdict", None)
    if told is not None and Verdict(told).colour != "green":  # whoever raises has proven nothing
        return Verdict(told), str(getattr(error, "reason", error))
    if _is_out_of_memory(error):
        return Verdict.OOM, _first_line(error)
    if isinstance(error, DefinitionError):
        return Verdict.ERROR, str(error)
    return Verdict.ERROR, f"{type(error).__name__}: {_first_line(error)}"


def forget_locals(error: BaseException) -> None:
    """Let go of the tensors in the frames that raised: an error that is kept, or a cycle, holds gigabytes otherwise.

    Its traceback still names every line; frames that still run keep what they have.
    """
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:500]


def _is_out_of_memory(error: BaseException) -> bool:
    """Python's, torch's (known by name, so that torch stays unimported), and that of torch's CPU allocator."""
    names = [kind.__name__ for kind in type(error).__mro__]
    return bool({"MemoryError", "OutOfMemoryError"} & set(names)) or "can't allocate memory" in str(error)

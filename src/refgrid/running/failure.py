"""What pytest shows of a red case: its report, without the frames of the instrument that found it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Protocol

from refgrid.records.record import Outcome, Verdict

# By the instrument itself; of all other failures the frames say where.
_FOUND = (Verdict.MISMATCH, Verdict.NONDETERMINISTIC)


class _Terminal(Protocol):
    def line(self, text: str) -> None: ...


class Told:
    """A failure as text; pytest's short summary takes its first line, the reason, from `reprcrash`."""

    def __init__(self, reason: str, text: str) -> None:
        self.reprcrash, self._text = SimpleNamespace(message=reason), text

    def __str__(self) -> str:
        return self._text

    def toterminal(self, terminal: _Terminal) -> None:
        """As pytest's own texts are written."""
        for line in self._text.splitlines():
            terminal.line(line)


def shown(outcome: Outcome, longrepr: object) -> Told:
    """The failure of a red case, as far as somebody who mends a reference reads it."""
    reason = f"{outcome.verdict.value}: {outcome.reason}"
    return Told(reason, f"{reason}\n\n{outcome.report}" if outcome.verdict in _FOUND else str(longrepr))

"""How old the kept reports of soaks are: which of what their verdicts followed from is another today.

The rule is that of verdicts on mutants. Another reference or adapter makes a report stale: it is about code that is no
longer there. Other tolerances and another instrument, of which a comment makes another, are told and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from refgrid.records.record import RecordError

Today = Mapping[str, Mapping[str, str]]  # as `refgrid.caching.today` has it

_DECIDING = ("references", "adapters")
_TOLD = {"tolerances": "older tolerances", "instrument": "an older instrument"}


class Age(NamedTuple):
    """A report in a line, why it is stale, which is empty where it is not, and the commands that make it anew."""

    file: Path
    told: str
    stale: str
    anew: str


def ages(folder: Path, today: Today) -> Iterator[Age]:
    """Of each report of the folder. Raises RecordError for a file that is no report of a soak."""
    for file in sorted(folder.glob("*_on_*.json")):
        try:
            yield _age(file, json.loads(file.read_text(encoding="utf-8")), today)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise RecordError(f"{file}: is no report of a soak that this version can read ({told})") from error


def _age(file: Path, soak: Mapping[str, Any], today: Today) -> Age:
    environment = soak["environment"]
    where = f"{environment['name']} on {environment['gpu'] or environment['device']}"
    judged = f"{len(soak['reds'])} red of {soak['judged']} case-seeds"
    stale, older = [*_unknown(soak), *_decides(soak, today)], [*_older(soak["parts"], today["parts"])]
    since = "; ".join([*stale, *older]) or "of what is here today"
    options = f"{environment['name']} --checks {','.join(soak['checks'])}"
    anew = f"nox -s soak -- {options}; refgrid soak --output {file.parent}"
    return Age(file, f"soak of {where}, {soak['dates'][1][:10]}: {judged}; {since}", "; ".join(stale), anew)


def _unknown(soak: Mapping[str, Any]) -> Iterator[str]:
    """What it does not tell cannot be held against today's."""
    missing = [name for name in _DECIDING if not soak.get(name)]
    if missing:
        yield f"it does not tell its {' and '.join(missing)}"


def _decides(soak: Mapping[str, Any], today: Today) -> Iterator[str]:
    for part in _DECIDING:
        measured = soak.get(part, {})
        changed = sum(today[part].get(name) != text for name, text in measured.items())
        if changed:
            yield f"{changed} of its {len(measured)} {part} have changed since"


def _older(measured: Mapping[str, str], today: Mapping[str, str]) -> Iterator[str]:
    """A report that does not tell its tolerances was written before they were a part of their own."""
    changed = [words for name, words in _TOLD.items() if measured.get(name) != today[name]]
    if changed:
        yield f"measured with {' and '.join(changed)}"

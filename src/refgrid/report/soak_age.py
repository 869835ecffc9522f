"""How old the kept reports of soaks are: of how many definitions the reference has changed since they were made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refgrid.records.record import RecordError


def ages(folder: Path, today: Mapping[str, str]) -> Iterator[str]:
    """A line for each report of the folder; `today` are the hashes of references by definition.

    Raises RecordError for a file that is no report of a soak.
    """
    for file in sorted(folder.glob("*_on_*.json")):
        try:
            yield _age(json.loads(file.read_text(encoding="utf-8")), today)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise RecordError(f"{file}: is no report of a soak that this version can read ({told})") from error


def _age(soak: Mapping[str, Any], today: Mapping[str, str]) -> str:
    measured, environment = soak["references"], soak["environment"]
    changed = sum(today.get(name) != text for name, text in measured.items())
    where = f"{environment['name']} on {environment['gpu'] or environment['device']}"
    judged = f"{len(soak['reds'])} red of {soak['judged']} case-seeds"
    since = f"the references of {changed} of its {len(measured)} definitions have changed since"
    return f"soak of {where}, {soak['dates'][1][:10]}: {judged}; {since if changed else 'of the references of today'}"

"""Columns of a folder of records, kept: they follow from the bytes of its files, today's references and this code.

Files that name one environment, one run or the evidence of each other are looked at together; what has changed in one
file makes the columns of its group anew, and those of no other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import TypeAdapter

from refgrid.dataset import smaller
from refgrid.records import digest
from refgrid.records.derived import Derived, hash_of
from refgrid.records.digest import Digested, digested
from refgrid.report.column import Column, columns
from refgrid.report.standing import histories

# The files of what makes columns, and of what they hold.
_FOLDERS = (Path(__file__).parent, Path(digest.__file__).parent)
CODE = (*(file for folder in _FOLDERS for file in sorted(folder.glob("*.py"))), *digest.CODE, Path(smaller.__file__))
_COLUMNS = TypeAdapter(list[Column])
_BY_PAIR = ("parts", "definitions")  # mappings whose keys JSON does not have


def read_columns(results: Path, folder: Path, references: Mapping[str, str]) -> list[Column]:
    """The columns of all records below `results` as evidence for today's references, see `Run.as_of`.

    They are kept in `folder`. Raises RecordError as `read_runs` does.
    """
    kept = Derived(folder, "columns", CODE)
    return [column for files in _groups(digested(results, folder)) for column in _columns(files, kept, references)]


def _columns(files: Sequence[Digested], kept: Derived, references: Mapping[str, str]) -> list[Column]:
    of = "\n".join(str(file.path) for file in files)
    made_of = hash_of(json.dumps([[file.hash for file in files], sorted(references.items())]).encode())
    found = kept.read(of, made_of, _parsed)
    if found is None:
        runs = [run.as_of(references) for file in files for run in file.runs]
        found = columns(histories(sorted(runs, key=lambda run: run.header.started)))
        kept.keep(of, made_of, _written(found))
    return found


def _groups(files: Iterable[Digested]) -> list[list[Digested]]:
    """Files that share a name, directly or by others between them, in their order."""
    groups: list[tuple[set[str], list[Digested]]] = []
    for file in files:
        same = [each for each in groups if not each[0].isdisjoint(file.names)]
        names = set(file.names).union(*(named for named, _ in same))
        together = [each for _, group in same for each in group]
        groups = [*(each for each in groups if each not in same), (names, [*together, file])]
    return [sorted(group, key=lambda file: file.path) for _, group in groups]


def _written(found: Sequence[Column]) -> bytes:
    told = _COLUMNS.dump_python(list(found))
    return json.dumps([{**each, **{name: list(each[name].items()) for name in _BY_PAIR}} for each in told]).encode()


def _parsed(text: bytes) -> list[Column]:
    told = json.loads(text)
    pairs = [{name: {tuple(key): cell for key, cell in each[name]} for name in _BY_PAIR} for each in told]
    return _COLUMNS.validate_python([{**each, **by_pair} for each, by_pair in zip(told, pairs, strict=True)])

"""The compatibility matrix: records in, a table of environments and ops out, in which every cell says why.

Rows are ops and, below each, what it is held against. A blank is never a pass: what nobody planned says so.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refgrid.cell import Cell, Row, rows, told, total
from refgrid.column import Column, columns
from refgrid.reason import Reason, reasons
from refgrid.record import Run, Verdict

REASONS_SHOWN = 12
SYMBOLS: Mapping[str, str] = {"red": "✗", "yellow": "?", "green": "✓"}
_COLUMN_WIDTH = 20  # holds "nondeterministic" and the versions without breaking a word
_GAP = 3  # blanks between two columns
_LABEL = "  held against"
_LEGEND = "✓ all proven   ? something not proven   ✗ something wrong   · N%: largest error over allowance"
_ASCII = str.maketrans({"✓": "ok", "✗": "X", "·": "/"})


@dataclass(frozen=True)
class Matrix:
    """Columns, rows (worst first) and reasons (worst first)."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    reasons: tuple[Reason, ...]

    @property
    def counts(self) -> dict[Verdict, int]:
        """Every outcome of the matrix by its verdict, worst first."""
        return total(cell for row in self.rows if row.against is None for cell in row.cells)

    @property
    def planned(self) -> int:
        """What the headers of the runs owe."""
        return sum(column.planned for column in self.columns)

    @property
    def exit_code(self) -> int:
        """1 when a cell is red or a planned case is not accounted for, 2 when nothing was proven, else 0."""
        found = {verdict.colour for verdict in self.counts}
        if "red" in found or self.planned != sum(self.counts.values()):
            return 1
        return 0 if "green" in found else 2

    @property
    def summary(self) -> str:
        """Planned = accounted, in one line; begins with "error" when they differ."""
        accounted, verdicts = sum(self.counts.values()), told(self.counts) or "nothing"
        if self.planned != accounted:
            return f"error: planned {self.planned} but accounted {accounted}: {verdicts}"
        proven = "" if self.exit_code in (0, 1) else "; nothing was proven"
        return f"planned {self.planned} = accounted {accounted}: {verdicts}{proven}"


def build(runs: Sequence[Run], declared: Mapping[str, str] | None = None) -> Matrix:
    """The matrix of all runs; `declared` maps environments to why they may have no record here."""
    found = columns(runs, declared or {})
    return Matrix(found, rows(found), reasons(found))


def print_matrix(matrix: Matrix, console: Console) -> None:
    """Environments as columns, in as many tables as the width needs; reasons below, then the sum of all."""
    bands = list(_bands(matrix, console.width)) if matrix.rows else []
    for band in bands:
        console.print(_table(matrix, band, console))
    if bands:
        console.print(_text(_LEGEND, console, "dim"))
    shown = {index for band in bands for index in band}
    for index, column in enumerate(matrix.columns):
        if index not in shown:
            console.print(_text(f"? {column.title}: {column.reason}", console, "yellow"))
    _print_reasons(matrix, console)
    styles = {0: "bold green", 1: "bold red", 2: "bold yellow"}
    console.print(_text(matrix.summary, console, styles[matrix.exit_code]))


def _bands(matrix: Matrix, width: int) -> Iterator[list[int]]:
    """Positions of the columns that stand side by side; a table of nothing but empty columns is left out."""
    at_once = max(1, (width - _label_width(matrix)) // (_COLUMN_WIDTH + _GAP))
    for start in range(0, len(matrix.columns), at_once):
        band = range(start, min(start + at_once, len(matrix.columns)))
        if any(matrix.columns[index].environment for index in band):
            yield list(band)


def _label_width(matrix: Matrix) -> int:
    return max(len(label) for row in matrix.rows for label in (_LABEL, row.op, f"  {row.against}"))


def _table(matrix: Matrix, band: Sequence[int], console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(f"op\n{_LABEL}", no_wrap=True)
    room = max(1, console.width - _label_width(matrix) - _GAP)
    for index in band:
        head = "\n".join(_head(matrix.columns[index]))
        table.add_column(_text(head, console, "bold"), min_width=min(_COLUMN_WIDTH, room), overflow="fold")
    for number, row in enumerate(matrix.rows):
        if row.against is None and number:
            table.add_section()
        label = Text(f"  {row.against}") if row.against else Text(row.op, "bold")
        cells = (_text(shown(row, row.cells[index]), console, row.cells[index].colour) for index in band)
        table.add_row(label, *cells)
    return table


def _head(column: Column) -> Iterator[str]:
    yield column.title
    environment = column.environment
    if environment is None:
        yield column.reason
        return
    yield f"torch {environment.torch or 'missing'}"
    for name, version in (("CUDA", environment.cuda), ("driver", environment.driver)):
        if version:
            yield f"{name} {version}"
    yield from libraries(column)
    yield measured(column)


def libraries(column: Column) -> list[str]:
    """Each ground-truth distribution of the column with its version."""
    found = column.environment.libraries if column.environment else {}
    return [f"{name} {version}" for name, version in sorted(found.items()) if name != "torch"]


def measured(column: Column) -> str:
    """The day, or the oldest and the newest day, that the column's outcomes are of."""
    days = sorted({date[:10] for date in column.dates or ()})
    return " to ".join(days) or "not run"


def shown(row: Row, cell: Cell) -> str:
    """A cell with its symbol; where a source was matched throughout, how much of the tolerance was used."""
    used = ""
    if row.against and cell.colour == "green" and cell.headroom is not None and math.isfinite(cell.headroom):
        used = f" · {math.ceil(100 * cell.headroom)}%"
    return f"{SYMBOLS[cell.colour]} {cell.text}{used}"


def _print_reasons(matrix: Matrix, console: Console) -> None:
    notes = [f"{column.title}: {note}" for column in matrix.columns for note in column.notes]
    if notes or matrix.reasons:
        console.print(Text("reasons, worst first", "bold"))
    for note in notes:
        console.print(_text(f"! {note}", console, "yellow"))
    for reason in matrix.reasons[:REASONS_SHOWN]:
        colour = reason.verdict.colour
        line = f"{SYMBOLS[colour]} {reason.count} {reason.verdict.value} · {reason.column} · {reason.against}"
        console.print(_text(line, console, colour))
        told_in_short = f"{shorten(reason.text, 300, placeholder=' ...')} (e.g. {reason.example})"
        console.print(Padding(_text(told_in_short, console), (0, 0, 0, 4)))
    hidden = matrix.reasons[REASONS_SHOWN:]
    if hidden:  # a red group may be too far down to print, but never without a word
        red = sum(reason.verdict.colour == "red" for reason in hidden)
        more = f"... and {len(hidden)} more in matrix.json" + (f", {red} of them red" if red else "")
        console.print(_text(more, console, "red" if red else ""))


def _text(text: str, console: Console, style: str = "") -> Text:
    """Text in which brackets mean nothing, in what the terminal's encoding can show."""
    if console.options.ascii_only:
        text = text.translate(_ASCII).encode("ascii", "replace").decode("ascii")
    return Text(text, style)


def write_files(matrix: Matrix, folder: Path) -> list[Path]:
    """Write matrix.md and matrix.json, each whole or not at all; returns both.

    Raises OSError when the folder cannot take them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "matrix.md": _markdown(matrix),
        "matrix.json": json.dumps(to_dict(matrix), indent=1, allow_nan=False),
    }
    return [_replace(folder / name, text) for name, text in texts.items()]


def _replace(file: Path, text: str) -> Path:
    unfinished = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        unfinished.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
    return file


def _markdown(matrix: Matrix) -> str:
    jinja = jinja2.Environment(loader=jinja2.PackageLoader("refgrid"), trim_blocks=True, lstrip_blocks=True)
    jinja.filters["cell"] = _escaped
    names = {"libraries": libraries, "measured": measured, "shown": shown, "symbols": SYMBOLS}
    return jinja.get_template("matrix.md.j2").render(matrix=matrix, **names)


def _escaped(text: str) -> str:
    """Text that ends neither its cell nor its line and is no markup."""
    return re.sub(r"([|<>*_`\\[\]])", r"\\\1", " ".join(text.split()))


def to_dict(matrix: Matrix) -> dict[str, Any]:
    """Everything as plain data, for strict JSON."""
    return {
        "summary": matrix.summary,
        "exit_code": matrix.exit_code,
        "planned": matrix.planned,
        "verdicts": _by_word(matrix.counts),
        "columns": [_column(column) for column in matrix.columns],
        "rows": [_row(row) for row in matrix.rows],
        "reasons": [{**asdict(reason), "verdict": reason.verdict.value} for reason in matrix.reasons],
    }


def _column(column: Column) -> dict[str, Any]:
    stand = Counter(entry.run.header.run for entry in column.outcomes)
    runs = [
        {
            "run": run.header.run,
            "started": run.header.started,
            "refgrid": run.header.refgrid,
            "file": run.file.as_posix(),
            "finished": run.finished,
            "planned": len(run.header.planned),
            "standing": stand[run.header.run],
            "environment": asdict(run.header.environment),
        }
        for run in column.runs
    ]
    environment = asdict(column.environment) if column.environment else None
    told = {"reason": column.reason, "notes": list(column.notes), "planned": column.planned}
    return {
        "title": column.title,
        "environment": environment,
        "dates": column.dates,
        **told,
        "runs": runs,
    }


def _row(row: Row) -> dict[str, Any]:
    return {"op": row.op, "against": row.against, "cells": [_plain(cell) for cell in row.cells]}


def _plain(cell: Cell) -> dict[str, Any]:
    headroom = cell.headroom if cell.headroom is None or math.isfinite(cell.headroom) else str(cell.headroom)
    verdicts = _by_word(cell.counts)
    worst = {"headroom": headroom, "headroom_case": cell.headroom_case, "dates": cell.dates}
    return {"text": cell.text, "colour": cell.colour, "planned": cell.planned, "verdicts": verdicts, **worst}


def _by_word(counts: Mapping[Verdict, int]) -> dict[str, int]:
    return {verdict.value: count for verdict, count in counts.items()}

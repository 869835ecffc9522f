"""The matrix on a terminal: as many tables as its width needs, in what its encoding can show."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from refgrid.records import derived
from refgrid.records.derived import Derived, hash_of
from refgrid.report.cell import Cell
from refgrid.report.column import Column
from refgrid.report.matrix import SYMBOLS, Matrix, libraries, measured, shown, told_in_full

REASONS_SHOWN = 12
DIFFERENCES_SHOWN = 40
_COLUMN_WIDTH = 20  # holds "nondeterministic" and the versions without breaking a word
_GAP = 3  # blanks between two columns
_OP_LABEL = ("op", "  held against")
_DEFINITION_LABEL = ("op_type", "  definition")
_LEGEND = "✓ all proven   ? something not proven   ✗ something wrong   · N%: largest error over allowance"
_CODE = (Path(__file__), Path(derived.__file__))  # of what lays tables out
_ASCII = str.maketrans({"✓": "ok", "✗": "X", "·": "/"})


def print_matrix(matrix: Matrix, console: Console, kept: Path, *, by_definition: bool = False) -> None:
    """Environments as columns, in as many tables as the width needs; reasons below, then the sum of all.

    Rows are ops and what they are held against, or, `by_definition`, definitions and their twins. Tables, whose layout
    takes longer than all else, are kept in the folder `kept`.
    """
    lines = list(_definition_lines(matrix) if by_definition else _op_lines(matrix))
    head = _DEFINITION_LABEL if by_definition else _OP_LABEL
    bands = list(_bands(matrix, [*head, *(line.label for line in lines)], console.width)) if lines else []
    for band in bands:
        _print_table(_Table(head, [list(_head(matrix.columns[index])) for index in band], lines, band), console, kept)
    if bands:
        console.print(_text(_LEGEND, console, "dim"))
    shown = {index for band in bands for index in band}
    for index, column in enumerate(matrix.columns):
        if index not in shown:
            console.print(_text(f"? {column.title}: {column.reason}", console, "yellow"))
    _print_differences(matrix, console)
    _print_reasons(matrix, console)
    styles = {0: "bold green", 1: "bold red", 2: "bold yellow"}
    console.print(_text(matrix.summary, console, styles[matrix.exit_code]))


class _Line(NamedTuple):
    """A row as it is printed; a `head` begins a group."""

    label: str
    head: bool
    cells: Sequence[str]
    colours: Sequence[str]


def _op_lines(matrix: Matrix) -> Iterator[_Line]:
    for row in matrix.rows:
        label = f"  {row.against}" if row.against else row.op
        yield _Line(label, row.against is None, [shown(row, cell) for cell in row.cells], _colours(row.cells))


def _definition_lines(matrix: Matrix) -> Iterator[_Line]:
    """An op_type, its definitions, and below one its twin; how a twin's constants differ is in the files."""
    op_type = None
    for row in matrix.definitions:
        if row.op_type != op_type:
            op_type = row.op_type
            yield _Line(op_type, head=True, cells=[""] * len(row.cells), colours=[""] * len(row.cells))
        label = "    ~twin" if row.twin else f"  {row.definition}"
        yield _Line(label, head=False, cells=[told_in_full(cell) for cell in row.cells], colours=_colours(row.cells))


def _colours(cells: Sequence[Cell]) -> list[str]:
    return [cell.colour for cell in cells]


def _bands(matrix: Matrix, labels: Sequence[str], width: int) -> Iterator[list[int]]:
    """Positions of the columns that stand side by side; a table of nothing but empty columns is left out."""
    at_once = max(1, (width - max(map(len, labels))) // (_COLUMN_WIDTH + _GAP))
    for start in range(0, len(matrix.columns), at_once):
        band = range(start, min(start + at_once, len(matrix.columns)))
        if any(matrix.columns[index].environment for index in band):
            yield list(band)


class _Table(NamedTuple):
    """What one table holds; `lines` have cells of other columns, too, and `band` says which are its own."""

    head: Sequence[str]
    titles: Sequence[Sequence[str]]
    lines: Sequence[_Line]
    band: Sequence[int]

    def __str__(self) -> str:
        """All that is laid out."""
        own = [
            (line.label, line.head, [(line.cells[index], line.colours[index]) for index in self.band])
            for line in self.lines
        ]
        return json.dumps([self.head, self.titles, own])


def _print_table(table: _Table, console: Console, kept: Path) -> None:
    """As it was laid out before, where all of it and the console are the same."""
    texts, made_of = Derived(kept, "table", _CODE), hash_of(str(table).encode())
    where = f"{console.options} {console.color_system} {console.no_color} rich {importlib.metadata.version('rich')}"
    of = f"{where} {table.head} {table.band}"
    text = texts.read(of, made_of, bytes.decode)
    if text is None:
        with console.capture() as laid_out:
            console.print(_laid_out(table, console))
        text = laid_out.get()
        texts.keep(of, made_of, text.encode())
    console.file.write(text)


def _laid_out(told: _Table, console: Console) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("\n".join(told.head), no_wrap=True)
    labels = (*told.head, *(line.label for line in told.lines))
    room = max(1, console.width - max(map(len, labels)) - _GAP)
    for title in told.titles:
        table.add_column(_text("\n".join(title), console, "bold"), min_width=min(_COLUMN_WIDTH, room), overflow="fold")
    for number, line in enumerate(told.lines):
        if line.head and number:
            table.add_section()
        cells = (_text(line.cells[index], console, line.colours[index]) for index in told.band)
        table.add_row(Text(line.label, "bold" if line.head else ""), *cells)
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
    if column.findings:  # told in full below: a line of its own would be many in a column
        yield f"! {len(column.findings)} finding{'s' if len(column.findings) > 1 else ''}"


def _print_differences(matrix: Matrix, console: Console) -> None:
    if matrix.differences:
        console.print(Text("differences between environments on one kind of machine", "bold"))
    for each in matrix.differences[:DIFFERENCES_SHOWN]:
        line = f"{each.machine} · {each.where} · {each.against} · {each.count} cases: "
        line += shorten(each.told, 400, placeholder=" ...")
        console.print(_text(line, console))
    if hidden := matrix.differences[DIFFERENCES_SHOWN:]:
        console.print(_text(f"... and {len(hidden)} more in matrix.json", console))


def _print_reasons(matrix: Matrix, console: Console) -> None:
    notes = [f"{column.title}: {note}" for column in matrix.columns for note in (*column.findings, *column.notes)]
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

"""Kept columns: the matrix of them is that of the records, and what has changed in a file makes its columns anew."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
from rich.console import Console
from rich.table import Table
from test_digest import hashed
from test_record import CASES, header

import refgrid
from refgrid.records import digest
from refgrid.records.derived import made_by
from refgrid.records.ledger import Ledger
from refgrid.records.record import Outcome, RecordError, Run, Verdict, read_runs
from refgrid.report import kept_columns, standing, terminal
from refgrid.report.kept_columns import read_columns
from refgrid.report.matrix import Matrix, assemble, build, write_files
from refgrid.report.standing import History
from refgrid.report.terminal import print_matrix

MEASURED = {"reference": "aa", "tolerance": "table"}
TODAY = {CASES[0].definition: "aa"}


def write(folder: Path, name: str, environment: str, verdict: Verdict = Verdict.MATCH, evidence: str = "") -> Path:
    """A run of all cases, the second of them known to be wrong and the third without a turn."""
    head = header()
    head = replace(head, run=name, environment=replace(head.environment, name=environment))
    ledger = Ledger(folder / f"{name}.jsonl", head)
    numbers = () if evidence else ({"headroom": "inf"}, {"headroom": 0.5})
    ledger.close_case(Outcome(CASES[0], verdict, "", numbers, hashes=MEASURED, evidence=evidence))
    ledger.close_case(Outcome(CASES[1], Verdict.EXPECTED, "known (why): 3 of 4", shrunk={"n": (8, 4)}))
    ledger.finish("stopped")
    return ledger.path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Records of three environments, the last of them settled by a run that another file holds."""
    folder = tmp_path / "results"
    write(folder, "one", "cpu")
    write(folder, "two", "old", Verdict.MISMATCH)
    write(folder, "three", "gpu")
    write(folder, "four", "gpu", Verdict.CACHED, "three")
    return folder


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The titles of columns that are made from now on."""
    titles: list[str] = []

    def histories(runs: list[Run]) -> list[History]:
        found = standing.histories(runs)
        titles.extend(history.title for history in found)
        return found

    monkeypatch.setattr(kept_columns, "histories", histories)
    return titles


def matrix(results: Path, today: Mapping[str, str] = TODAY) -> Matrix:
    return assemble(read_columns(results, results.parent / "kept", today), {"new": "why"}, {"another_n4": "another"})


def from_records(results: Path, today: Mapping[str, str] = TODAY) -> Matrix:
    runs = [run.as_of(today) for run in read_runs(results)]
    return build(runs, {"new": "why"}, {"another_n4": "another"})


def columns(results: Path) -> list[Path]:
    return sorted((results.parent / "kept").glob("*.columns"))


def test_the_matrix_is_that_of_the_records_and_its_files_are_the_same_bytes(results: Path, made: list[str]) -> None:
    cold = matrix(results)
    assert sorted(made) == ["cpu on CPU", "gpu on CPU", "old on CPU"]
    made.clear()
    warm = matrix(results)

    assert made == []
    assert cold == warm == from_records(results)
    texts = [
        [file.read_bytes() for file in write_files(each, results.parent / name)]
        for name, each in (("cold", cold), ("warm", warm), ("records", from_records(results)))
    ]
    assert texts[0] == texts[1] == texts[2]


def test_files_of_one_environment_and_those_that_evidence_ties_stand_together(results: Path) -> None:
    write(results, "five", "newest", Verdict.CACHED, "one")
    matrix(results)

    assert len(columns(results)) == 3  # cpu with newest, gpu with its two files, and old
    assert matrix(results) == from_records(results)


@pytest.mark.parametrize("name", ["one", "three", "four"])
def test_a_changed_file_makes_the_columns_of_its_group_anew(results: Path, made: list[str], name: str) -> None:
    matrix(results)
    file, kept = results / f"{name}.jsonl", columns(results)
    before = file.stat()
    file.write_text(file.read_text().replace("3 of 4", "2 of 4"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    made.clear()

    assert matrix(results) == from_records(results)
    assert made == ["cpu on CPU" if name == "one" else "gpu on CPU"]
    assert len(set(columns(results)) - set(kept)) == 1
    assert len(columns(results)) == len(kept)


def test_a_file_that_has_come_or_gone_counts(results: Path, made: list[str]) -> None:
    matrix(results)
    write(results, "five", "cpu", Verdict.CRASH)
    made.clear()
    assert matrix(results) == from_records(results)
    assert made == ["cpu on CPU"]

    (results / "five.jsonl").unlink()
    assert matrix(results) == from_records(results)


def test_another_reference_makes_all_of_them_anew(results: Path, made: list[str]) -> None:
    before = matrix(results)
    made.clear()
    today = {CASES[0].definition: "bb"}

    assert matrix(results, today) == from_records(results, today) != before
    assert sorted(made) == ["cpu on CPU", "gpu on CPU", "old on CPU"]


def test_other_code_makes_all_of_them_anew(results: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    matrix(results)
    made.clear()
    monkeypatch.setattr(kept_columns, "CODE", (*kept_columns.CODE, Path(__file__)))

    assert matrix(results) == from_records(results)
    assert sorted(made) == ["cpu on CPU", "gpu on CPU", "old on CPU"]
    assert len(columns(results)) == 3


@pytest.mark.parametrize(
    "file",
    [
        *("report/kept_columns.py", "report/column.py", "report/cell.py", "report/standing.py", "report/reason.py"),
        *("records/record.py", "records/carried.py", "records/digest.py", "records/derived.py"),
        *("dataset/case.py", "dataset/smaller.py", "environments/measured.py"),
    ],
)
def test_an_edit_of_what_makes_columns_makes_other_code(tmp_path: Path, file: str) -> None:
    edited = tmp_path / "edited.py"
    edited.write_text(f"{(Path(refgrid.__file__).parent / file).read_text()}# another meaning\n")
    files = [edited if each.match(file) else each for each in kept_columns.CODE]

    assert edited in files
    assert made_by(files) != made_by(kept_columns.CODE)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="cut"),
        pytest.param(lambda whole: whole.replace(b'"match"', b'"crash"'), id="changed"),
        pytest.param(lambda whole: whole.partition(b"\n")[2], id="without its hash"),
        pytest.param(lambda _: hashed(b"[{}]"), id="of another kind"),
        pytest.param(lambda _: hashed(b"7"), id="of another type"),
        pytest.param(lambda _: hashed(b"{"), id="no JSON"),
    ],
)
def test_damaged_columns_are_made_anew(results: Path, made: list[str], damage: Callable[[bytes], bytes]) -> None:
    matrix(results)
    whole = [file.read_bytes() for file in columns(results)]
    for file in columns(results):
        file.write_bytes(damage(file.read_bytes()))
    made.clear()

    assert matrix(results) == from_records(results)
    assert made
    assert [file.read_bytes() for file in columns(results)] == whole


@pytest.mark.parametrize("damage", [lambda _: b"", lambda whole: whole[:-9], lambda _: hashed(b"7")])
def test_damaged_names_are_looked_up_anew(
    results: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    """Without them nothing would tie the files of one environment."""
    monkeypatch.setattr(digest, "_WORTH_IT", 0)
    matrix(results)
    whole = {file: file.read_bytes() for file in (results.parent / "kept").glob("*.names")}
    assert len(whole) == 4
    for file, names in whole.items():
        file.write_bytes(damage(names))

    assert matrix(results) == from_records(results)
    assert {file: file.read_bytes() for file in whole} == whole


def test_a_folder_that_takes_no_columns_costs_nothing_but_time(results: Path) -> None:
    (results.parent / "kept").write_text("a file where the folder should be")

    assert matrix(results) == matrix(results) == from_records(results)


def test_what_cannot_be_read_is_named_as_ever(results: Path) -> None:
    matrix(results)
    (results / "one.jsonl").write_text("?\n" + (results / "one.jsonl").read_text())

    with pytest.raises(RecordError, match=r"one\.jsonl:1: is no record"):
        matrix(results)


@pytest.fixture
def laid_out(monkeypatch: pytest.MonkeyPatch) -> list[Table]:
    """The tables that are laid out from now on."""
    tables: list[Table] = []

    def counted(*told: Any) -> Table:
        tables.append(lay_out(*told))
        return tables[-1]

    lay_out = terminal._laid_out
    monkeypatch.setattr(terminal, "_laid_out", counted)
    return tables


def printed(matrix: Matrix, kept: Path, width: int = 80, colours: Literal["truecolor"] | None = None) -> str:
    file = io.StringIO()
    print_matrix(matrix, Console(file=file, width=width, color_system=colours, force_terminal=bool(colours)), kept)
    return file.getvalue()


@pytest.mark.parametrize("colours", [None, "truecolor"])
@pytest.mark.parametrize("width", [60, 300])
def test_what_is_printed_is_the_same_bytes(
    results: Path, laid_out: list[Table], width: int, colours: Literal["truecolor"] | None
) -> None:
    kept = results.parent / "kept"
    nowhere = printed(from_records(results), Path(os.devnull), width, colours)
    cold = printed(matrix(results), kept, width, colours)
    laid_out.clear()
    warm = printed(matrix(results), kept, width, colours)

    assert laid_out == []
    assert cold == warm == nowhere
    assert ("\x1b[" in warm) is bool(colours)


def test_a_table_is_laid_out_anew_for_another_console_or_another_cell(results: Path, laid_out: list[Table]) -> None:
    kept = results.parent / "kept"
    before = printed(matrix(results), kept, 300)
    for width, colours in ((301, None), (300, "truecolor")):
        laid_out.clear()
        assert printed(matrix(results), kept, width, cast(Any, colours)) != before
        assert len(laid_out) == 1
    write(results, "zero", "cpu", Verdict.CRASH)
    laid_out.clear()

    assert "1 crash" in printed(matrix(results), kept, 300)
    assert len(laid_out) == 1


@pytest.mark.parametrize("damage", [lambda _: b"", lambda whole: whole[:-9], lambda _: hashed(b"\xff")])
def test_a_damaged_table_is_laid_out_anew(results: Path, damage: Callable[[bytes], bytes]) -> None:
    kept = results.parent / "kept"
    before = printed(matrix(results), kept)
    tables = list(kept.glob("*.table"))
    assert tables
    for file in tables:
        file.write_bytes(damage(file.read_bytes()))

    assert printed(matrix(results), kept) == before

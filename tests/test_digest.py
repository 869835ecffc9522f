"""Digests of record files: the matrix of them is that of the records, and a file that has changed has none."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from test_record import CASES, header

import refgrid
from refgrid.records import digest, record
from refgrid.records.derived import hash_of, made_by
from refgrid.records.digest import read_digested, without_collection
from refgrid.records.ledger import Ledger
from refgrid.records.record import Outcome, RecordError, Run, Verdict, read_runs
from refgrid.report.matrix import build, to_dict

NUMBERS = {"output": "y", "headroom": 0.5, "worst": [{"index": [0, 1], "error": 1e-7}]}


@pytest.fixture(autouse=True)
def every_file_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_WORTH_IT", 0)


def write(folder: Path, *, finish: bool = True) -> Path:
    ledger = Ledger(folder / "run.jsonl", header())
    ledger.close_case(Outcome(CASES[0], Verdict.MATCH, "", (NUMBERS, {"headroom": None}), {"compare": 1.0}))
    ledger.close_case(Outcome(CASES[1], Verdict.MISMATCH, "y is off", ({"headroom": "inf"},), shrunk={"n": (8, 4)}))
    if finish:
        ledger.finish("stopped", ["late"])
    else:
        ledger._file.close()
    return ledger.path


def parsed_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose lines are parsed from now on."""
    parsed: list[Path] = []

    def runs_of(path: Path) -> Iterator[Run]:
        parsed.append(path)
        return record.runs_of(path)

    monkeypatch.setattr(digest, "runs_of", runs_of)
    return parsed


def digests(folder: Path) -> list[Path]:
    return sorted((folder / "digests").glob("*.digest"))


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "killed"])
def test_the_matrix_of_digests_is_that_of_the_records(tmp_path: Path, *, finish: bool) -> None:
    write(tmp_path / "results", finish=finish)
    whole = to_dict(build(read_runs(tmp_path / "results")))

    told = [to_dict(build(read_digested(tmp_path / "results", tmp_path / "digests"))) for _ in range(2)]

    assert told == [whole, whole]
    assert len(digests(tmp_path)) == 1


def test_a_digest_is_read_in_place_of_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")

    read = parsed_files(monkeypatch)
    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    assert (run.file, read) == (file, [])
    assert [outcome.verdict.value for outcome in run.accounted()] == ["match", "mismatch", "not-run"]


def test_a_file_that_has_changed_is_read_anew_and_its_old_digest_goes(tmp_path: Path) -> None:
    file = write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")
    (old,), before = digests(tmp_path), file.stat()
    file.write_text(file.read_text().replace('"match"', '"crash"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size  # its bytes alone tell

    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    assert run.accounted()[0].verdict is Verdict.CRASH
    assert old not in digests(tmp_path)
    assert len(digests(tmp_path)) == 1


def test_a_digest_of_other_code_is_not_used_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "results")
    with monkeypatch.context() as before:
        before.setattr(digest, "CODE", (Path(__file__),))
        read_digested(tmp_path / "results", tmp_path / "digests")
    (old,) = digests(tmp_path)

    read = parsed_files(monkeypatch)
    read_digested(tmp_path / "results", tmp_path / "digests")

    assert read == [tmp_path / "results" / "run.jsonl"]
    assert old not in digests(tmp_path)
    assert len(digests(tmp_path)) == 1


@pytest.mark.parametrize(
    "file",
    ["records/digest.py", "records/derived.py", "records/record.py", "dataset/case.py", "environments/measured.py"],
)
def test_an_edit_of_what_writes_and_reads_digests_makes_other_code(tmp_path: Path, file: str) -> None:
    edited = tmp_path / "edited.py"
    edited.write_text(f"{(Path(refgrid.__file__).parent / file).read_text()}# another meaning\n")
    files = [edited if each.match(file) else each for each in digest.CODE]

    assert edited in files
    assert made_by(files) != made_by(digest.CODE)


def hashed(text: bytes) -> bytes:
    return hash_of(text).encode() + b"\n" + text


FORGED = b'{"cases":[[0]],"endings":[],"runs":[{"planned":[7]}]}'


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="cut"),
        pytest.param(lambda whole: whole.replace(b'"match"', b'"crash"'), id="changed"),
        pytest.param(lambda whole: whole.partition(b"\n")[2], id="without its hash"),
        pytest.param(lambda _: hashed(FORGED), id="of another kind"),
        pytest.param(lambda _: hashed(b"[]"), id="of another type"),
        pytest.param(lambda _: hashed(b"{"), id="no JSON"),
    ],
)
def test_a_damaged_digest_is_made_anew_from_the_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    file = write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")
    (kept,) = digests(tmp_path)
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))

    read = parsed_files(monkeypatch)
    runs = read_digested(tmp_path / "results", tmp_path / "digests")

    assert read == [file]
    assert runs == read_runs(tmp_path / "results")
    assert kept.read_bytes() == whole


def test_a_settled_run_parses_no_line_of_what_has_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")
    new = write(tmp_path / "results" / "new")

    read = parsed_files(monkeypatch)
    read_digested(tmp_path / "results", tmp_path / "digests")
    read_digested(tmp_path / "results", tmp_path / "digests")

    assert read == [new]


def test_runs_of_digests_share_their_cases(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "results" / name)
    read_digested(tmp_path / "results", tmp_path / "digests")

    first, second = read_digested(tmp_path / "results", tmp_path / "digests")

    assert all(a is b for a, b in zip(first.header.planned, second.header.planned, strict=True))
    assert first.outcomes[CASES[1].id].case is second.header.planned[1]


def test_of_an_outcome_a_digest_lacks_what_it_says_it_lacks_and_nothing_else(tmp_path: Path) -> None:
    hashes = {"reference": "aa", "tolerance": "0.5", "key": "bb", "inputs": "cc", "workload": "dd"}
    told = Outcome(CASES[0], Verdict.MATCH, "why", (NUMBERS,), {"a": 1.5, "b": 2.5}, hashes, {"n": 4}, {"n": (8, 4)})
    told = replace(told, evidence="0123", device="a GPU", report="two\nlines")
    ledger = Ledger(tmp_path / "results" / "run.jsonl", header())
    ledger.close_case(told)
    ledger.finish("")
    read_digested(tmp_path / "results", tmp_path / "digests")

    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    kept = {"reference": "aa", "tolerance": "0.5"}
    short = replace(told, comparisons=({"headroom": 0.5},), seconds={"all": 4.0}, hashes=kept, axes={})
    assert run.outcomes[told.case.id] == short
    assert replace(run, outcomes={}) == replace(read_runs(tmp_path / "results")[0], outcomes={})


def test_what_cannot_be_read_is_named_as_ever(tmp_path: Path) -> None:
    file = write(tmp_path / "results")
    file.write_text("?\n" + file.read_text())

    with pytest.raises(RecordError, match=r"run\.jsonl:1: is no record"):
        read_digested(tmp_path / "results", tmp_path / "digests")


def test_a_folder_that_takes_no_digest_costs_nothing_but_time(tmp_path: Path) -> None:
    write(tmp_path / "results")
    (tmp_path / "digests").write_text("a file where the folder should be")

    assert len(read_digested(tmp_path / "results", tmp_path / "digests")) == 1


def test_the_collector_is_as_it_was_afterwards_but_for_what_was_made() -> None:
    with without_collection():
        assert not gc.isenabled()
        made = [[each] for each in range(1000)]

    assert gc.isenabled()
    assert not any(each is made[0] for each in gc.get_objects())
    gc.unfreeze()
    assert any(each is made[0] for each in gc.get_objects())

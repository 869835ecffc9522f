"""Digests of record files: the matrix of them is that of the records, and a file that has changed has none."""

from __future__ import annotations

import gc
import os
from dataclasses import fields
from pathlib import Path

import pytest
from test_record import CASES, header

from refgrid.records import digest
from refgrid.records.digest import read_digested, without_collection
from refgrid.records.ledger import Ledger
from refgrid.records.record import Header, Outcome, RecordError, Run, Verdict, read_runs
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


def digests(folder: Path) -> list[Path]:
    return sorted((folder / "digests").glob("*.digest"))


@pytest.mark.parametrize("finish", [True, False], ids=["finished", "killed"])
def test_the_matrix_of_digests_is_that_of_the_records(tmp_path: Path, *, finish: bool) -> None:
    write(tmp_path / "results", finish=finish)
    whole = to_dict(build(read_runs(tmp_path / "results")))

    told = [to_dict(build(read_digested(tmp_path / "results", tmp_path / "digests"))) for _ in range(2)]

    assert told == [whole, whole]
    assert len(digests(tmp_path)) == 1


def test_a_digest_is_read_in_place_of_its_file(tmp_path: Path) -> None:
    file = write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")
    before = file.stat()
    file.write_bytes(b"?" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    assert run.file == file
    assert [outcome.verdict.value for outcome in run.accounted()] == ["match", "mismatch", "not-run"]


def test_a_file_that_has_changed_is_read_anew_and_its_old_digest_goes(tmp_path: Path) -> None:
    file = write(tmp_path / "results")
    read_digested(tmp_path / "results", tmp_path / "digests")
    (old,) = digests(tmp_path)
    file.write_text(file.read_text().replace('"match"', '"crash"'))

    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    assert run.accounted()[0].verdict is Verdict.CRASH
    assert old not in digests(tmp_path)
    assert len(digests(tmp_path)) == 1


def test_a_digest_of_the_same_fields_with_another_meaning_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "results")
    names = ",".join(field.name for kind in (Header, Outcome, Run) for field in fields(kind))
    with monkeypatch.context() as before:
        before.setattr(digest, "_SHAPE", names)  # as it was when digests left the seconds out
        read_digested(tmp_path / "results", tmp_path / "digests")
    (old,) = digests(tmp_path)
    old.write_text(old.read_text().replace('"match"', '"crash"'))

    (run,) = read_digested(tmp_path / "results", tmp_path / "digests")

    assert run.accounted()[0].verdict is Verdict.MATCH


def test_what_cannot_be_read_is_named_as_ever(tmp_path: Path) -> None:
    file = write(tmp_path / "results")
    file.write_text("?\n" + file.read_text())

    with pytest.raises(RecordError, match=r"run\.jsonl:1: is no record"):
        read_digested(tmp_path / "results", tmp_path / "digests")


def test_a_folder_that_takes_no_digest_costs_nothing_but_time(tmp_path: Path) -> None:
    write(tmp_path / "results")
    (tmp_path / "digests").write_text("a file where the folder should be")

    assert len(read_digested(tmp_path / "results", tmp_path / "digests")) == 1


def test_the_collector_is_as_it_was_afterwards() -> None:
    with without_collection():
        assert not gc.isenabled()

    assert gc.isenabled()

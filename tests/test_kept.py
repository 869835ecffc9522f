"""`refgrid keep`: runs become committed evidence, and nothing of them is lost or told twice."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_record import CASES, header

from refgrid.cli import main
from refgrid.environments.machine import environment_of
from refgrid.records.kept import keep
from refgrid.records.ledger import Ledger, claim
from refgrid.records.record import Header, Outcome, RecordError, Verdict, read_runs, runs_of


def name_of(header: Header) -> str:
    return header.environment.name


def run_of(file: Path, run: str, outcomes: int, started: str = "2026-11-20T06:00:00+00:00") -> Path:
    """A run that was killed after some of its cases."""
    ledger = Ledger(file, header(run, started))
    for case in CASES[:outcomes]:
        ledger.close_case(Outcome(case, Verdict.MATCH, "", ({"output": "y", "headroom": 0.5},), {"compare": 1.0}))
    ledger._file.close()
    return file


def kept_in(folder: Path) -> dict[str, int]:
    return {run.header.run: len(run.outcomes) for run in read_runs(folder)}


def test_runs_are_kept_as_they_were_written_oldest_first(tmp_path: Path) -> None:
    new = run_of(tmp_path / "new.jsonl", "new", 2, "2026-11-21T06:00:00+00:00")
    old = run_of(tmp_path / "old.jsonl", "old", 3)

    (file,) = keep([new, old], tmp_path / "results", name_of)

    assert gzip.decompress(file.read_bytes()) == old.read_bytes() + new.read_bytes()
    assert [run.outcomes for run in runs_of(file)] == [run.outcomes for each in (old, new) for run in runs_of(each)]
    assert environment_of(file) == ("cpu", "2026-11-20T06:00:00+00:00")


def test_the_same_runs_are_the_same_bytes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "a.jsonl", "a", 3)
    (first,) = keep([run], tmp_path / "one", name_of)
    (second,) = keep([run, first], tmp_path / "two", name_of)

    assert first.read_bytes() == second.read_bytes()


def test_a_run_that_went_on_takes_the_place_of_its_first_part(tmp_path: Path) -> None:
    file = run_of(tmp_path / "a.jsonl", "a", 1)
    keep([file], tmp_path / "results", name_of)
    (left,) = runs_of(file)
    claimed = claim(file)
    assert claimed
    resumed = Ledger.resumed(left, claimed)
    resumed.close_case(Outcome(CASES[1], Verdict.MATCH))
    resumed.finish("stopped")

    keep([file], tmp_path / "results", name_of)
    keep([run_of(tmp_path / "again.jsonl", "a", 1)], tmp_path / "results", name_of)  # its first part, once more

    assert kept_in(tmp_path / "results") == {"a": 3}


def test_a_plain_file_of_that_name_is_packed_too(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    run_of(tmp_path / "results" / "cpu.jsonl", "plain", 2)

    keep([run_of(tmp_path / "b.jsonl", "b", 3)], tmp_path / "results", name_of)

    assert kept_in(tmp_path / "results") == {"plain": 2, "b": 3}
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["cpu.jsonl.gz"]


def pack(*files: Path, folder: Path) -> bytes:
    """What is kept of these files, unpacked."""
    (file,) = keep(files, folder, name_of)
    return gzip.decompress(file.read_bytes())


def test_an_outcome_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    one, two = run_of(tmp_path / "one.jsonl", "a", 1), run_of(tmp_path / "two.jsonl", "a", 2)
    two.write_bytes(two.read_bytes()[:-20])

    assert pack(two, folder=tmp_path / "results") == one.read_bytes()
    assert kept_in(tmp_path / "results") == {"a": 1}


@pytest.mark.parametrize("cut", [5, 20, -20])
def test_a_header_that_a_kill_cut_short_begins_no_run(tmp_path: Path, cut: int) -> None:
    file, sound = run_of(tmp_path / "a.jsonl", "a", 2), run_of(tmp_path / "sound.jsonl", "a", 2)
    header_alone = run_of(tmp_path / "b.jsonl", "b", 0)
    header_alone.write_bytes(header_alone.read_bytes()[:cut])
    file.write_bytes(sound.read_bytes() + header_alone.read_bytes())

    assert keep([header_alone], tmp_path / "nothing", name_of) == {}
    assert pack(file, folder=tmp_path / "results") == sound.read_bytes()
    assert kept_in(tmp_path / "results") == {"a": 2}


@pytest.mark.parametrize("outcomes", [0, 2], ids=["header", "outcome"])
def test_a_last_line_that_lacks_its_newline_alone_is_kept(tmp_path: Path, outcomes: int) -> None:
    file, sound = run_of(tmp_path / "a.jsonl", "a", outcomes), run_of(tmp_path / "sound.jsonl", "a", outcomes)
    later = run_of(tmp_path / "b.jsonl", "b", 1, "2026-11-21T06:00:00+00:00")
    file.write_bytes(sound.read_bytes().removesuffix(b"\n"))

    assert pack(file, later, folder=tmp_path / "results") == sound.read_bytes() + later.read_bytes()
    assert kept_in(tmp_path / "results") == {"a": outcomes, "b": 1}


def test_nothing_is_written_where_one_file_cannot_be_read(tmp_path: Path) -> None:
    sound, broken = run_of(tmp_path / "a.jsonl", "a", 2), tmp_path / "b.jsonl"
    broken.write_text("no record\n\n")

    with pytest.raises(RecordError, match=r"b\.jsonl:1: is no record"):
        keep([sound, broken], tmp_path / "results", name_of)

    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("damage", [lambda packed: packed[:-9], lambda packed: b"plain" + packed], ids=["cut", "other"])
def test_a_damaged_pack_is_named(tmp_path: Path, damage: object) -> None:
    (file,) = keep([run_of(tmp_path / "a.jsonl", "a", 2)], tmp_path / "results", name_of)
    assert callable(damage)
    file.write_bytes(damage(file.read_bytes()))

    with pytest.raises(RecordError, match=r"cpu\.jsonl\.gz: records cannot be read"):
        read_runs(tmp_path / "results")


def test_a_folder_that_cannot_be_written_is_named_and_keeps_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")

    with pytest.raises(RecordError, match=r"records cannot be written"):
        keep([run_of(tmp_path / "a.jsonl", "a", 2)], tmp_path / "results", name_of)


def test_the_command_names_the_files_by_environment_and_machine(tmp_path: Path) -> None:
    file = run_of(tmp_path / "a.jsonl", "a", 2)

    done = CliRunner().invoke(main, ["keep", str(file), "--results", str(tmp_path / "results")])

    assert done.exit_code == 0, done.output
    assert "1 run," in done.output
    (kept,) = (tmp_path / "results").iterdir()
    assert kept.name.startswith("cpu-")


def test_the_command_refuses_what_is_no_file_of_records(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n\n")

    done = CliRunner().invoke(main, ["keep", str(tmp_path / "b.jsonl"), "--results", str(tmp_path)])

    assert done.exit_code == 2
    assert "b.jsonl:1" in done.output

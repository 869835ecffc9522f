"""Records: each guard of the writer and of the reader fires, and a killed run leaves what it had written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from refgrid.dataset.case import Case
from refgrid.environments.measured import Environment
from refgrid.records.ledger import Ledger, claim
from refgrid.records.record import Header, Outcome, RecordError, Run, Verdict, now, read_runs, verdict_counts

CPU = Environment("cpu", "cpu", "3.11.9", "linux x86_64", "2.13.0", None, None, None, None, 0, {"torch": "2.13.0"})
CASES = tuple(Case("double_n4", "double", "double", f"b{size}", "numerics", "torch") for size in (1, 2, 3))


def header(run: str = "aa", started: str = "2026-11-20T06:00:00+00:00", cases: Sequence[Case] = CASES) -> Header:
    return Header(run, started, "0.1.0", CPU, tuple(cases))


def finished_file(folder: Path) -> Path:
    """A whole run: header, three matches, end; five lines."""
    ledger = Ledger(folder / "run.jsonl", header())
    for case in CASES:
        ledger.close_case(Outcome(case, Verdict.MATCH))
    ledger.finish("")
    return ledger.path


OpenLedger = Callable[..., Ledger]


@pytest.fixture
def open_ledger(tmp_path: Path) -> Iterator[OpenLedger]:
    """Opens ledgers that the test may leave unfinished, as a kill would."""
    opened: list[Ledger] = []

    def open_(first_line: Header | None = None) -> Ledger:
        opened.append(Ledger(tmp_path / "run.jsonl", first_line or header()))
        return opened[-1]

    yield open_
    for ledger in opened:
        ledger._file.close()


def only_run(folder: Path) -> Run:
    (run,) = read_runs(folder)
    return run


def test_a_finished_run_reads_back_as_it_was_written(tmp_path: Path) -> None:
    comparison = {"output": "y", "headroom": 0.5, "worst": [{"index": [0, 1], "error": 1e-7}]}
    told = Outcome(CASES[0], Verdict.MISMATCH, "y is off", (comparison,), {"compare": 0.1}, {"inputs": "ab"})
    ledger = Ledger(tmp_path / "deep" / "run.jsonl", header())
    ledger.close_case(told)
    ledger.finish("interrupted")

    run = only_run(tmp_path)

    assert (run.header, run.finished, run.file) == (header(), True, ledger.path)
    assert run.accounted() == [told, *(Outcome(case, Verdict.NOT_RUN, "interrupted") for case in CASES[1:])]


def test_an_outcome_is_on_disk_before_the_next_case_begins(tmp_path: Path, open_ledger: OpenLedger) -> None:
    ledger = open_ledger()
    ledger.close_case(Outcome(CASES[0], Verdict.MATCH))

    assert only_run(tmp_path).outcomes == {CASES[0].id: Outcome(CASES[0], Verdict.MATCH)}


def test_what_a_killed_run_did_not_record_is_not_run(tmp_path: Path, open_ledger: OpenLedger) -> None:
    open_ledger().close_case(Outcome(CASES[1], Verdict.MATCH))

    run = only_run(tmp_path)

    assert not run.finished
    assert [outcome.verdict.value for outcome in run.accounted()] == ["not-run", "match", "not-run"]
    assert run.accounted()[0].reason == "the run ended before its turn"


def test_a_finished_run_that_lost_a_case_says_so(tmp_path: Path) -> None:
    file = finished_file(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[2:]))

    assert only_run(tmp_path).accounted()[0] == Outcome(CASES[0], Verdict.NOT_RUN, "the run finished without it")


def test_a_run_that_goes_on_keeps_every_verdict_but_not_run(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl", header())
    ledger.close_case(Outcome(CASES[0], Verdict.MISMATCH, "off"))
    ledger.finish("interrupted", ["early"])
    before = only_run(tmp_path)

    file = claim(ledger.path)
    assert file
    again = Ledger.resumed(before, file)
    assert list(again.open_cases) == [case.id for case in CASES[1:]]
    again.close_case(Outcome(CASES[1], Verdict.MATCH))
    with pytest.raises(RecordError, match="already has a verdict"):
        again.close_case(Outcome(CASES[0], Verdict.MATCH))
    halfway = only_run(tmp_path)
    again.close_case(Outcome(CASES[2], Verdict.MATCH))
    again.finish("", ["late"])

    run = only_run(tmp_path)
    assert [outcome.verdict.value for outcome in halfway.accounted()] == ["mismatch", "match", "not-run"]
    assert (before.stopped, halfway.finished, run.stopped) == ("interrupted", False, "")
    assert [outcome.verdict.value for outcome in run.accounted()] == ["mismatch", "match", "match"]
    assert run.findings == ("early", "late")
    assert again.verdicts == {"mismatch": 1, "match": 2}


@pytest.mark.parametrize(
    ("between", "told"),
    [
        pytest.param("", "stands after the end of its run", id="after the end"),
        pytest.param('{"type":"resume"}\n', "has its verdict already", id="a second verdict"),
    ],
)
def test_only_what_was_not_run_takes_another_verdict(tmp_path: Path, between: str, told: str) -> None:
    file = finished_file(tmp_path)
    outcome = file.read_text().splitlines(keepends=True)[1]
    file.write_text(file.read_text() + between + outcome)

    with pytest.raises(RecordError, match=told) as caught:
        read_runs(tmp_path)

    assert str(caught.value).startswith(f"{file}:{6 + bool(between)}: {CASES[0].id} ")


def test_what_was_measured_with_another_reference_text_proves_nothing_today(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl", header())
    for case, text in zip(CASES, ("today", "yesterday", None), strict=True):
        ledger.close_case(Outcome(case, Verdict.MATCH, hashes={"reference": text} if text else {}))
    ledger.finish("")

    stands, fell, never_ran = only_run(tmp_path).as_of({"double_n4": "today"}).accounted()

    assert [stands.verdict, fell.verdict, never_ran.verdict] == [Verdict.MATCH, Verdict.NOT_RUN, Verdict.MATCH]
    assert fell.reason == "the reference has changed since it was match"
    assert only_run(tmp_path).as_of({}).accounted() == only_run(tmp_path).accounted()


def test_an_unplanned_case_is_refused(open_ledger: OpenLedger) -> None:
    ledger = open_ledger()
    stranger = Case("gemm_n4", "gemm", "gemm", "m1", "shape")

    with pytest.raises(RecordError, match="gemm_n4-m1-shape: is not planned in this run"):
        ledger.close_case(Outcome(stranger, Verdict.MATCH))


def test_a_case_is_closed_once(tmp_path: Path, open_ledger: OpenLedger) -> None:
    ledger = open_ledger()
    ledger.close_case(Outcome(CASES[0], Verdict.MISMATCH, "off"))

    with pytest.raises(RecordError, match="already has a verdict"):
        ledger.close_case(Outcome(CASES[0], Verdict.MATCH))

    assert only_run(tmp_path).outcomes[CASES[0].id].verdict is Verdict.MISMATCH


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_has_no_word_for_is_refused(open_ledger: OpenLedger, value: float) -> None:
    ledger = open_ledger()
    before = ledger.path.read_bytes()

    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.close_case(Outcome(CASES[0], Verdict.MATCH, comparisons=({"headroom": value},)))

    assert ledger.path.read_bytes() == before
    assert CASES[0].id in ledger.open_cases


def test_the_end_counts_the_verdicts(tmp_path: Path) -> None:
    last = json.loads(finished_file(tmp_path).read_text().splitlines()[-1])

    assert (last["type"], last["verdicts"], last["findings"]) == ("end", {"match": 3}, [])


def test_findings_of_the_head_and_of_the_end_are_read_back_each_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "run.jsonl", replace(header(), findings=("no nvcc", "mixed")))
    ledger.finish("", ["compiled late: norm", "mixed"])

    assert only_run(tmp_path).findings == ("no nvcc", "mixed", "compiled late: norm")


def test_records_of_before_there_were_findings_are_read(tmp_path: Path) -> None:
    file = finished_file(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    del lines[0]["findings"], lines[-1]["findings"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    assert only_run(tmp_path).findings == ()


def test_findings_that_are_no_texts_name_file_and_line(tmp_path: Path) -> None:
    file = finished_file(tmp_path)
    file.write_text("".join(file.read_text().rpartition('"findings":[]')[0] + '"findings":[1]}'))

    with pytest.raises(RecordError, match=r"run\.jsonl:5: 0: Input should be a valid string"):
        read_runs(tmp_path)


@pytest.mark.parametrize("kept", [1, 2, 40])
def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path: Path, kept: int) -> None:
    file = finished_file(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:kept])

    run = only_run(tmp_path)

    assert not run.finished
    assert list(run.outcomes) == [case.id for case in CASES[:2]]


UNKNOWN_CASE = '{"type":"outcome","case":"gemm_n4-m1-shape","verdict":"match"}'
UNKNOWN_VERDICT = f'{{"type":"outcome","case":"{CASES[1].id}","verdict":"fine"}}'


@pytest.mark.parametrize(
    "line",
    [
        pytest.param('{"type":"outcome","ca', id="cut short"),
        pytest.param('{"case":"x"}', id="no type"),
        pytest.param("[1, 2]", id="no object"),
        pytest.param(UNKNOWN_CASE, id="a case that was not planned"),
        pytest.param(UNKNOWN_VERDICT, id="an unknown verdict"),
        pytest.param('{"type":"outcome","verdict":"match"}', id="no case"),
        pytest.param('{"type":"run","run":"bb"}', id="half a header"),
        pytest.param('{"type":"outcome","\udcff"}', id="no UTF-8"),
    ],
)
def test_a_corrupt_line_in_the_middle_is_named_with_file_and_line(tmp_path: Path, line: str) -> None:
    file = finished_file(tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = line.encode("utf-8", "surrogateescape") + b"\n"
    file.write_bytes(b"".join(lines))

    with pytest.raises(RecordError) as caught:
        read_runs(tmp_path)

    assert str(caught.value).startswith(f"{file}:3: ")
    assert str(caught.value).endswith("; take the line out, or put the file away: the cases it told of are owed again")


def test_a_corrupt_last_line_that_was_written_whole_is_an_error(tmp_path: Path) -> None:
    file = finished_file(tmp_path)
    file.write_text(file.read_text() + '{"type":"ou\n')

    with pytest.raises(RecordError, match=r"run\.jsonl:6: "):
        read_runs(tmp_path)


def test_a_file_that_does_not_begin_with_a_header_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").write_text('{"type":"end","verdicts":{}}\n')

    with pytest.raises(RecordError, match="should begin with a 'run' line"):
        read_runs(tmp_path)


def test_runs_are_read_from_subfolders_and_joined_files_oldest_first(tmp_path: Path) -> None:
    for run, day in (("new", "20"), ("old", "18"), ("mid", "19")):
        file = tmp_path / "a.jsonl" if run != "mid" else tmp_path / "deep" / "b.jsonl"
        Ledger(file, header(run, f"2026-11-{day}T06:00:00+00:00")).finish("stopped")

    assert [run.header.run for run in read_runs(tmp_path)] == ["old", "mid", "new"]


def test_a_new_header_ends_a_killed_run_in_the_same_file(tmp_path: Path, open_ledger: OpenLedger) -> None:
    open_ledger(header("killed"))
    open_ledger(header("next")).finish("stopped")

    assert [(run.header.run, run.finished) for run in read_runs(tmp_path)] == [
        ("killed", False),
        ("next", True),
    ]


def test_no_folder_is_no_run(tmp_path: Path) -> None:
    assert read_runs(tmp_path / "absent") == []


@pytest.mark.parametrize("below", ["run.jsonl", "deep/run.jsonl"])
def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_case(tmp_path: Path, below: str) -> None:
    (tmp_path / "results").write_text("a file where the folder should be; holds for root, whom no mode stops")

    with pytest.raises(RecordError, match=r"run\.jsonl: records cannot be written: "):
        Ledger(tmp_path / "results" / below, header())


PROGRAM = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_record import CASES, header
from refgrid.records.ledger import Ledger
from refgrid.records.record import Outcome, RecordError, Verdict

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

folder = Path({folder!r})
"""
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="RLIMIT_FSIZE is a POSIX limit")


def run_program(folder: Path, body: str) -> str:
    """A program of its own, because a limit on file sizes holds for the whole process."""
    text = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(folder)) + body
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@posix_only
def test_a_disk_too_small_for_the_run_is_an_error_before_the_first_case(tmp_path: Path) -> None:
    body = """
limit(Ledger.BYTES_PER_CASE * len(CASES))
try:
    Ledger(folder / "run.jsonl", header())
except RecordError as error:
    print(error)
"""
    told = run_program(tmp_path, body)

    assert told.startswith(f"{tmp_path / 'run.jsonl'}: records cannot be written: File too large")
    assert list(tmp_path.iterdir()) == []  # the probe is gone, and no empty run is left to be read


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_disk_without_space_is_an_error_of_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "run.jsonl").symlink_to("/dev/full")
    body = """
try:
    Ledger(folder / "run.jsonl", header())
except RecordError as error:
    print(error)
"""

    assert run_program(tmp_path, body) == (
        f"{tmp_path / 'run.jsonl'}: a record cannot be written: No space left on device\n"
    )


@posix_only
def test_a_disk_that_fills_up_on_the_way_is_an_error_and_what_was_written_stays(tmp_path: Path) -> None:
    body = """
ledger = Ledger(folder / "run.jsonl", header())
ledger.close_case(Outcome(CASES[0], Verdict.MATCH))
limit(ledger.path.stat().st_size + 10)
try:
    ledger.close_case(Outcome(CASES[1], Verdict.MATCH))
except RecordError as error:
    print(error, CASES[1].id in ledger.open_cases, flush=True)
import os
os._exit(0)
"""
    told = run_program(tmp_path, body)

    assert told == f"{tmp_path / 'run.jsonl'}: a record cannot be written: File too large True\n"
    assert list(only_run(tmp_path).outcomes) == [CASES[0].id]


def test_time_is_utc_to_the_second() -> None:
    assert now().endswith("+00:00")
    assert len(now()) == len("2026-11-20T06:00:00+00:00")


def test_verdicts_are_counted_worst_first() -> None:
    outcomes = [
        Outcome(CASES[0], verdict) for verdict in (Verdict.MATCH, Verdict.MISSING, Verdict.CRASH, Verdict.MATCH)
    ]

    assert list(verdict_counts(outcomes).items()) == [
        (Verdict.CRASH, 1),
        (Verdict.MISSING, 1),
        (Verdict.MATCH, 2),
    ]


def test_only_what_proves_something_is_green() -> None:
    green = {verdict.value for verdict in Verdict if verdict.colour == "green"}
    yellow = {verdict.value for verdict in Verdict if verdict.colour == "yellow"}

    assert green == {"match", "expected", "cached"}
    assert yellow == {"missing", "unsupported", "api-absent", "no-ground-truth", "unresolvable", "not-run"}

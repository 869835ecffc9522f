"""Which recorded outcomes stand: the newest under a key decides, and what memory decided only where it was bounded."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from test_record import CASES, header

from refgrid.caching import evidence, searched
from refgrid.caching.evidence import Bounds, Evidence, newest_match, record_files, standing
from refgrid.caching.key import Keys
from refgrid.caching.searched import Searched
from refgrid.records.derived import hash_of
from refgrid.records.ledger import Ledger, claim
from refgrid.records.record import Outcome, RecordError, Verdict

CASE = CASES[0]
HELD = "weights of 60.0 GiB are held 2 times, as drawn and as handed out; {} are free for this worker"
GIB = 2.0**30
KNOWN = set[Verdict]()  # the failures that are expected of the case


class OneKey:
    """The keys of a machine on which nothing changes."""

    def key(self, _: object, tolerance: str = "table") -> str:
        return {"table": "aa", "0.5": "bb"}[tolerance]

    def failures_known(self, _: object) -> set[Verdict]:
        return KNOWN


def record(folder: Path, day: int, verdict: Verdict, reason: str = "", tolerance: str = "table", **facts: Any) -> Path:
    ledger = Ledger(folder / f"{day}.jsonl", header(f"run{day}", f"2026-11-{day}T06:00:00+00:00", [CASE]))
    hashes = {"key": OneKey().key(CASE, tolerance), "tolerance": tolerance}
    ledger.close_case(Outcome(CASE, verdict, reason, hashes=hashes, **facts))
    ledger.finish("")
    return ledger.path


def stands(folder: Path, memory: float = math.inf, room: float | None = None) -> Mapping[str, Evidence]:
    keys, bounds = cast(Keys, OneKey()), Bounds(memory, memory if room is None else room)
    files = record_files([folder])
    return standing(files, keys, [CASE], "table", bounds, Searched(folder / "kept")).get(CASE.id, {})


@pytest.mark.parametrize("verdict", Verdict, ids=lambda verdict: verdict.value)
def test_only_a_match_and_what_the_key_decides_stand(tmp_path: Path, verdict: Verdict) -> None:
    record(tmp_path, 10, verdict)

    found = stands(tmp_path)

    decided = {"match", "missing", "unsupported", "api-absent", "no-ground-truth"}
    assert bool(found) is (verdict.value in decided)


@pytest.mark.parametrize(
    ("known", "stays"),
    [
        pytest.param({Verdict.MISMATCH}, True, id="a mismatch, which was repeated"),
        pytest.param({Verdict.OOM}, False, id="out of memory"),
        pytest.param({Verdict.CRASH}, False, id="a crash"),
        pytest.param({Verdict.NONDETERMINISTIC}, False, id="other results each time"),
        pytest.param({Verdict.ERROR}, False, id="an error"),
        pytest.param({Verdict.MISMATCH, Verdict.HANG}, False, id="a mismatch or a hang, and nobody knows which it was"),
        pytest.param(set(), False, id="nothing"),
    ],
)
def test_of_expected_failures_a_mismatch_alone_stands_and_keeps_its_verdict_and_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: set[Verdict], *, stays: bool
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "KNOWN", known)
    record(tmp_path, 10, Verdict.EXPECTED, "tiles are left unmasked (https://a/b): lse is off")

    told = [each.outcome(CASE, "aa") for each in stands(tmp_path).values()]

    assert [(each.verdict, each.reason, each.evidence) for each in told] == [
        (Verdict.EXPECTED, "tiles are left unmasked (https://a/b): lse is off", "run10")
    ] * stays


def test_the_evidence_against_a_sampler_is_not_taken_for_that_of_another_run(tmp_path: Path) -> None:
    """Every match of a sampler with a law has it among its numbers; without them all would run each time."""
    record(tmp_path, 10, Verdict.MATCH, comparisons=({"output": "samples", "evidence": {"nats": -0.3}},))

    assert stands(tmp_path)["table"].run == "run10"


def test_of_a_run_that_measured_nothing_under_a_key_of_today_no_line_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its header names every case: that of each kept run would be parsed each time."""
    record(tmp_path, 10, Verdict.MATCH)
    other = record(tmp_path, 11, Verdict.MATCH)
    other.write_text(other.read_text().replace('"key":"aa"', '"key":"cc"'))
    parsed: list[bytes] = []
    parse = evidence._parsed

    def counted(line: bytes) -> dict[str, Any]:
        parsed.append(line)
        return parse(line)

    monkeypatch.setattr(evidence, "_parsed", counted)

    assert stands(tmp_path)["table"].run == "run10"
    assert [b"run10" in line for line in parsed] == [True, False]  # the header, then the outcome
    assert b"run11" not in b"".join(parsed)


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files whose lines are looked at from now on."""
    names: list[str] = []

    def lines(file: Path) -> list[bytes]:
        names.append(file.name)
        return looked_at(file)

    looked_at = searched.lines
    monkeypatch.setattr(searched, "lines", lines)
    monkeypatch.setattr(evidence, "lines", lines)
    return names


def other_key(file: Path) -> None:
    """What another machine measured; as many bytes, at the same time."""
    before = file.stat()
    file.write_text(file.read_text().replace('"key":"aa"', '"key":"cc"'))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_without_a_key_of_today_is_not_searched_again(tmp_path: Path, unpacked: list[str]) -> None:
    record(tmp_path, 10, Verdict.MATCH)
    other_key(record(tmp_path, 11, Verdict.MATCH))
    first = stands(tmp_path)
    unpacked.clear()

    assert stands(tmp_path) == first
    assert unpacked == ["10.jsonl"]


def test_of_another_tolerance_all_is_searched(tmp_path: Path, unpacked: list[str]) -> None:
    """Its key of today is another for each tolerance, and which there are nobody knows before."""
    other_key(record(tmp_path, 11, Verdict.MATCH, tolerance="0.5"))
    stands(tmp_path)
    unpacked.clear()

    assert stands(tmp_path)["0.5"].run == "run11"
    assert unpacked == ["11.jsonl"]


def test_keys_are_those_of_the_bytes_of_a_file(tmp_path: Path) -> None:
    file = record(tmp_path, 10, Verdict.MATCH)
    assert stands(tmp_path)
    other_key(file)
    assert stands(tmp_path) == {}

    file.write_text(file.read_text().replace('"key":"cc"', '"key":"aa"'))
    assert stands(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "another kind", "other code"])
def test_damaged_keys_are_looked_up_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    record(tmp_path, 10, Verdict.MATCH)
    before = stands(tmp_path)
    (kept,) = (tmp_path / "kept").glob("*.keys")
    whole = kept.read_bytes()
    if damage == "other code":
        kept.write_bytes(whole[:32] + b"\n[]")
        monkeypatch.setattr(searched, "CODE", (Path(__file__),))
    else:
        kept.write_bytes({"cut": whole[:-3], "empty": b"", "another kind": hash_of(b"7").encode() + b"\n7"}[damage])

    assert stands(tmp_path) == before != {}


def test_what_took_its_evidence_from_another_run_is_none_itself(tmp_path: Path) -> None:
    record(tmp_path, 10, Verdict.MISSING, "not installed", evidence="0123456789ab")

    assert stands(tmp_path) == {}


def test_a_cached_outcome_is_told_from_what_it_was_measured_as(tmp_path: Path) -> None:
    record(tmp_path, 10, Verdict.MISSING, "not installed")
    record(tmp_path / "green", 11, Verdict.MATCH, "lse: not given")

    missing, match = (stands(folder)["table"].outcome(CASE, "aa") for folder in (tmp_path, tmp_path / "green"))

    assert match.verdict is Verdict.CACHED  # the newer of the two
    assert missing == match
    assert stands(tmp_path)["table"].run == "run11"


@pytest.mark.parametrize(
    ("then", "tolerance", "still"),
    [
        pytest.param(Verdict.MATCH, "table", True, id="a match"),
        pytest.param(Verdict.MISMATCH, "table", False, id="a mismatch"),
        pytest.param(Verdict.OOM, "table", False, id="out of memory"),
        pytest.param(Verdict.MISMATCH, "0.5", True, id="a mismatch under another tolerance"),
        pytest.param(Verdict.CRASH, "0.5", False, id="a crash, which cannot say under which tolerance"),
        pytest.param(Verdict.NOT_RUN, "table", True, id="a case that had no turn"),
    ],
)
def test_the_newest_outcome_under_a_key_decides(tmp_path: Path, then: Verdict, tolerance: str, *, still: bool) -> None:
    record(tmp_path, 10, Verdict.MATCH)
    record(tmp_path, 12, then, "some reason", tolerance)

    assert ("table" in stands(tmp_path)) is still


@pytest.mark.parametrize(
    ("reason", "memory", "stays"),
    [
        pytest.param(HELD.format("2.0 GiB"), 2 * GIB, True, id="the bound was the reason"),
        pytest.param(HELD.format("1.3 GiB"), 2 * GIB, False, id="less than the bound was free"),
        pytest.param(HELD.format("41.9 GiB"), math.inf, False, id="no bound"),
        pytest.param("the budget of 20m was spent", 2 * GIB, False, id="no time"),
    ],
)
def test_what_did_not_fit_stands_only_where_the_bound_was_the_reason(
    tmp_path: Path, reason: str, memory: float, *, stays: bool
) -> None:
    record(tmp_path, 10, Verdict.NOT_RUN, reason)

    assert bool(stands(tmp_path, memory)) is stays


@pytest.mark.parametrize(
    ("free", "room", "stays"),
    [
        pytest.param("92.3 GiB", 72 * GIB, True, id="more than a worker has in any case"),
        pytest.param("72.0 GiB", 72.04 * GIB, True, id="as much, to the last digit that is told"),
        pytest.param("60.0 GiB", 72 * GIB, False, id="less, since a stranger used the GPU"),
        pytest.param("92.3 GiB", 121 * GIB, False, id="less than fewer workers have"),
        pytest.param("0 B", 72 * GIB, False, id="nothing"),
    ],
)
def test_what_did_not_fit_on_a_gpu_stands_where_it_had_all_that_a_worker_is_sure_of(
    tmp_path: Path, free: str, room: float, *, stays: bool
) -> None:
    record(tmp_path, 10, Verdict.NOT_RUN, HELD.format(free))

    assert bool(stands(tmp_path, room=room)) is stays


@pytest.mark.parametrize(("memory", "stays"), [(2 * GIB, True), (math.inf, False)], ids=["bounded", "unbounded"])
def test_a_match_at_a_size_that_was_cut_stands_only_where_memory_is_bounded(
    tmp_path: Path, memory: float, *, stays: bool
) -> None:
    record(tmp_path, 10, Verdict.MATCH, "cut", shrunk={"seq_len": (8, 4)})

    assert bool(stands(tmp_path, memory)) is stays


@pytest.mark.parametrize("damage", ["cut", "gone", "no header"])
def test_what_cannot_be_read_is_no_evidence(tmp_path: Path, damage: str) -> None:
    file = record(tmp_path, 10, Verdict.MATCH)
    files = record_files([tmp_path])
    lines = file.read_bytes().splitlines(keepends=True)
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(lines[0] + lines[1][:-9] if damage == "cut" else lines[1])

    assert standing(files, cast(Keys, OneKey()), [CASE], "table", Bounds(), Searched(tmp_path)) == {}


def test_the_newest_match_of_a_case_is_found_under_whatever_key(tmp_path: Path) -> None:
    record(tmp_path, 10, Verdict.MATCH)
    record(tmp_path, 11, Verdict.MATCH, tolerance="0.5")
    record(tmp_path, 12, Verdict.MISMATCH)

    assert newest_match(record_files([tmp_path]), {CASE.id})[CASE.id].run == "run11"
    assert newest_match(record_files([tmp_path]), {"another"}) == {}


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="records cannot be written: Is a directory"):
        claim(tmp_path)

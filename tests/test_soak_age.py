"""The age of kept soaks: reports whose references have changed since say so, wherever the matrix is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from guards import ROOT, published

from refgrid.cli import main
from refgrid.dataset.reference import text_hash
from refgrid.records.record import RecordError
from refgrid.report.soak_age import ages

SOAK = {
    "environment": {"name": "cpu", "device": "cpu", "gpu": None},
    "dates": ["2026-11-20T01:00:00+00:00", "2026-11-21T01:00:00+00:00"],
    "judged": 500,
    "reds": [],
    "references": {"one": "a", "two": "b", "gone": "c"},
}


def write(folder: Path, **changes: object) -> Path:
    (folder / "cpu_on_cpu.json").write_text(json.dumps({**SOAK, **changes}))
    return folder


def test_a_soak_says_of_how_many_definitions_the_reference_has_changed_since(tmp_path: Path) -> None:
    told = "soak of cpu on cpu, 2026-11-21: 0 red of 500 case-seeds; "

    assert list(ages(write(tmp_path), {"one": "a", "two": "B", "new": "d"})) == [
        f"{told}the references of 2 of its 3 definitions have changed since"
    ]
    assert list(ages(tmp_path, {"one": "a", "two": "b", "gone": "c"})) == [f"{told}of the references of today"]


def test_a_file_that_is_no_report_is_refused_with_its_name(tmp_path: Path) -> None:
    write(tmp_path, references=None)

    with pytest.raises(RecordError, match=r"cpu_on_cpu\.json: is no report of a soak that this version can read"):
        list(ages(tmp_path, {}))


def test_the_kept_reports_tell_their_age() -> None:
    today = {name: text_hash(each.reference) for name, each in published().definitions.items()}

    assert len(list(ages(ROOT / "results" / "soak", today))) == len(list((ROOT / "results/soak").glob("*_on_*.md")))


def test_the_matrix_prints_it(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    write(tmp_path / "soak")

    done = CliRunner().invoke(
        main, ["matrix", f"--results={tmp_path}", f"--output={tmp_path}", f"--dataset={tmp_path}"]
    )

    assert "of its 3 definitions have changed since" in done.output, done.output

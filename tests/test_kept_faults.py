"""What is kept of faults on a real GPU: from pytest's report, whole and passed, and about today's table of faults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fault_table import FAULTS
from kept_faults import ENVIRONMENT, FAULT, file_name, kept, lacks, main

COMMITTED = sorted((Path(__file__).parents[1] / "results" / "faults").glob("*.json"))
HERE = {"name": "cu130-overlay", "gpu": "NVIDIA H200", "torch": "2.11.0", "libraries": {"triton": "3.6.0"}}
TOLD = [
    {
        "fault": fault.name,
        "planted": fault.strike,
        "verdict": fault.verdict,
        "reason": f"so it is: {fault.told} [worker gw0] & <more>",
        "seconds_without_the_gpu": 4.2,
    }
    for fault in FAULTS
]
TELLING = """
import json, pytest

def test_faults(record_testsuite_property):
    for name, value in {told!r}.items():
        record_testsuite_property(name, json.dumps(value))
    {end}
"""


def report(pytester: pytest.Pytester, told: list[dict[str, Any]] | None = None, end: str = "", **more: Any) -> Path:
    """What pytest writes of a test that tells it."""
    found = {
        ENVIRONMENT: HERE,
        **{f"{FAULT}{each['fault']}": each for each in (TOLD if told is None else told)},
        **more,
    }
    pytester.makepyfile(TELLING.format(told=found, end=end))
    pytester.runpytest("-p", "no:cacheprovider", "--junitxml=faults.xml")
    return pytester.path / "faults.xml"


def test_a_report_is_kept_with_every_fault_the_versions_and_the_date(pytester: pytest.Pytester) -> None:
    done = CliRunner().invoke(main, [str(report(pytester)), str(pytester.path / "kept")])

    (file,) = (pytester.path / "kept").iterdir()
    assert done.exit_code == 0, done.output
    assert file.name == "cu130-overlay_on_nvidia_h200.json"
    page = json.loads(file.read_text())
    assert page["faults"] == TOLD
    assert page["environment"] == HERE
    assert page["date"].startswith("20")
    assert page["seconds"] > 0
    assert page["tests"] == ["test_faults"]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        pytest.param({"end": "assert 0"}, "is no evidence that faults are survived: test_faults: failure", id="failed"),
        pytest.param({"end": "pytest.skip('no GPU')"}, "test_faults: skipped", id="skipped"),
        pytest.param({"told": TOLD[1:]}, f"{FAULTS[0].name} was not planted", id="a fault is missing"),
        pytest.param({"told": [*TOLD[1:], {**TOLD[0], "verdict": "match"}]}, "index ended in match: ", id="verdict"),
        pytest.param({"told": [*TOLD[1:], {**TOLD[0], "reason": "?"}]}, "index ended in crash: ?", id="reason"),
        pytest.param({"environment": {**HERE, "gpu": None}}, "no GPU is named on which it ran", id="no GPU"),
    ],
)
def test_what_is_no_evidence_is_refused(pytester: pytest.Pytester, how: dict[str, Any], why: str) -> None:
    done = CliRunner().invoke(main, [str(report(pytester, **how)), str(pytester.path / "kept")])

    assert done.exit_code == 1
    assert why in done.output
    assert not (pytester.path / "kept").exists()


@pytest.mark.parametrize("text", ["", "<testsuites/>", "<testsuite/>"])
def test_what_is_no_report_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "faults.xml").write_text(text)

    done = CliRunner().invoke(main, [str(tmp_path / "faults.xml"), str(tmp_path / "kept")])

    assert done.exit_code == 1
    assert "faults.xml: " in done.output


def test_a_page_of_another_table_of_faults_is_found(pytester: pytest.Pytester) -> None:
    page = kept(report(pytester))
    first, *others = page["faults"]

    assert list(lacks(page)) == []
    assert list(lacks({**page, "faults": others})) == ["index was not planted"]
    (told,) = lacks({**page, "faults": [{**first, "planted": "pass"}, *others]})
    assert told.startswith("index was 'pass' and is 'return x[")
    more = [*page["faults"], {**first, "fault": "gone"}]
    assert list(lacks({**page, "faults": more})) == ["gone is in the table no more"]


def test_what_is_committed_is_about_todays_faults_and_bears_its_name() -> None:
    """A loop: before the first page is kept there is nothing to be held."""
    for file in COMMITTED:
        page = json.loads(file.read_text())
        assert list(lacks(page)) == [], file.name
        assert file.name == file_name(page)

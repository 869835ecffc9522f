"""The report of a run on a GPU says where it ran, whoever ran the tests."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from kept_faults import ENVIRONMENT

CONFTEST = Path(__file__).parent / "gpu_report.py"


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_a_report_names_where_it_ran(
    workers: list[str], pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFGRID_ENVIRONMENT", "cu130-overlay")  # the plugin would refuse: it is not installed here
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makepyfile("def test_nothing(): ...")

    pytester.runpytest_subprocess("-p", "no:refgrid", *workers, "--junitxml=report.xml").assert_outcomes(passed=1)

    told = {each.get("name"): each.get("value") for each in ET.parse(pytester.path / "report.xml").iter("property")}
    assert set(told) == {ENVIRONMENT, "gpu", "torch", "date"}
    assert json.loads(told[ENVIRONMENT] or "")["name"] == "cu130-overlay"
    assert (told["date"] or "").startswith("20")


def test_the_folder_of_gpu_tests_has_it() -> None:
    assert "from gpu_report import pytest_sessionstart" in (CONFTEST.parent / "gpu/conftest.py").read_text()

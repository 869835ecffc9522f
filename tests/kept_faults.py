"""What became of the faults that tests/gpu/test_faults_gpu.py plants into a run of a real GPU, to be committed.

    python3 -m pytest tests/gpu/test_faults_gpu.py --junitxml=faults.xml
    python tests/kept_faults.py faults.xml results/faults

The tests tell it as properties of pytest's report, and tests/gpu_report.py where they ran. A report of which a test
failed, or that lacks a fault, is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import click
from fault_table import FAULTS

ENVIRONMENT, FAULT = "environment", "fault "  # names of properties; behind the latter the fault's


class Refused(click.ClickException):
    """A report is no evidence: the reason."""


def kept(report: Path) -> dict[str, Any]:
    """The report as it is committed. Raises Refused."""
    suite = _suite(report)
    told = {str(each.get("name")): str(each.get("value")) for each in suite.iter("property")}
    page = {
        "environment": json.loads(told.get(ENVIRONMENT, "null")),
        "date": suite.get("timestamp"),
        "seconds": float(suite.get("time", 0)),
        "tests": [case.get("name") for case in suite.iter("testcase")],
        "faults": [json.loads(value) for name, value in told.items() if name.startswith(FAULT)],
    }
    if wrong := [*_not_passed(suite), *lacks(page)]:
        raise Refused(f"{report} is no evidence that faults are survived: {'; '.join(wrong)}")
    return page


def _suite(report: Path) -> ET.Element:
    try:
        suites = list(ET.parse(report).iter("testsuite"))
    except (OSError, ET.ParseError) as error:
        raise Refused(f"{report}: is no report of pytest: {error}") from error
    if len(suites) != 1 or not suites[0].get("timestamp"):
        raise Refused(f"{report}: should be of one run of pytest, with its date, and has {len(suites)}")
    return suites[0]


def lacks(page: Mapping[str, Any]) -> Iterator[str]:
    """What keeps a page from being evidence for today's table of faults."""
    if not (page["environment"] and page["environment"].get("gpu")):
        yield "no GPU is named on which it ran"
    told = {each["fault"]: each for each in page["faults"]}
    for fault in FAULTS:
        found = told.pop(fault.name, None)
        if found is None:
            yield f"{fault.name} was not planted"
        elif found["planted"] != fault.strike:
            yield f"{fault.name} was {found['planted']!r} and is {fault.strike!r} now"
        elif found["verdict"] != fault.verdict or fault.told not in found["reason"]:
            yield f"{fault.name} ended in {found['verdict']}: {found['reason']}"
    yield from (f"{name} is in the table no more" for name in told)


def file_name(page: Mapping[str, Any]) -> str:
    """As other results are called: cu130-overlay_on_nvidia_h200.json."""
    environment = page["environment"]
    return re.sub(r"[^\w.-]", "_", f"{environment['name']}_on_{environment['gpu']}").lower() + ".json"


def _not_passed(suite: ET.Element) -> Iterator[str]:
    for case in suite.iter("testcase"):
        yield from (f"{case.get('name')}: {each.tag}" for each in case if each.tag in {"failure", "error", "skipped"})


@click.command()
@click.argument("report", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(report: Path, folder: Path) -> None:
    """Write what pytest's REPORT tells of the faults into the FOLDER of those that are kept."""
    page = kept(report)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / file_name(page)
    file.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")
    click.echo(f"written: {file}")


if __name__ == "__main__":
    main(sys.argv[1:])

"""The product as it runs: pytest on tests/references, whose folder the tests of the instrument share."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from guards import ROOT

COUNTS = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_sessionfinish():
    import refgrid_groundtruth
    print("found before, found:", refgrid_groundtruth._outcome.cache_info()[:2])
"""


def test_a_source_is_found_and_proven_once_for_all_cases_of_a_run(tmp_path: Path) -> None:
    """A self-test a case was a sixth of a run's time on a GPU: what tests share must not make them forget."""
    (tmp_path / "counts.py").write_text(COUNTS)
    command = [sys.executable, "-m", "pytest", "-p", "refgrid.plugin", "-p", "counts", "-p", "no:cacheprovider", "-qs"]
    asked = ["tests/references/test_rmsnorm.py", "--device=cpu", "--test-sizes=small", "--results", str(tmp_path)]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}

    done = subprocess.run(
        [*command, *asked, "-k", "TestRmsnormH128 and torch"],
        cwd=ROOT,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )

    found = re.search(r"found before, found: \((\d+), (\d+)\)", done.stdout)
    assert found, done.stdout + done.stderr
    before, anew = map(int, found.groups())
    assert anew == 1
    assert before >= 1

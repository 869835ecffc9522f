"""The age of kept soaks: reports say what of theirs has changed since, and are stale where it is what they judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from guards import ROOT, published

from refgrid.caching.key import Keys, Machine
from refgrid.caching.today import today
from refgrid.cli import main
from refgrid.dataset.case import Selection, plan
from refgrid.environments.measured import measure
from refgrid.proving.expected import load_expected
from refgrid.records.record import RecordError
from refgrid.report.soak_age import Age, ages
from refgrid.sources import Sources

KEPT = ROOT / "results" / "soak"
PARTS: dict[str, Any] = {
    "references": {"one": "a", "two": "b", "gone": "c"},
    "adapters": {"gemm torch": "d", "gemm oracle": "e"},
    "parts": {"instrument": "f", "tolerances": "g"},
}
SOAK = {
    "environment": {"name": "cpu", "device": "cpu", "gpu": None},
    "dates": ["2026-11-20T01:00:00+00:00", "2026-11-21T01:00:00+00:00"],
    "judged": 500,
    "checks": {"numerics": 400, "agreement": 100},
    "reds": [],
    **PARTS,
}


@cache
def of_today() -> Mapping[str, Mapping[str, str]]:
    return today(published().definitions, Sources())


def write(folder: Path, **changes: object) -> Path:
    (folder / "cpu_on_cpu.json").write_text(json.dumps({**SOAK, **changes}))
    return folder


def age(folder: Path, **changes: object) -> Age:
    (found,) = ages(write(folder, **changes), PARTS)
    return found


def test_a_soak_of_what_is_here_is_not_stale(tmp_path: Path) -> None:
    told = "soak of cpu on cpu, 2026-11-21: 0 red of 500 case-seeds; of what is here today"

    assert age(tmp_path) == (tmp_path / "cpu_on_cpu.json", told, "", age(tmp_path).anew)
    assert age(tmp_path).anew == f"nox -s soak -- cpu --checks numerics,agreement; refgrid soak --output {tmp_path}"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"references": {"one": "a", "two": "B", "new": "c"}}, "2 of its 3 references have changed since"),
        ({"adapters": {"gemm torch": "D", "gemm oracle": "e"}}, "1 of its 2 adapters have changed since"),
        ({"adapters": {}}, "it does not tell its adapters"),
    ],
)
def test_a_soak_of_another_reference_or_adapter_is_stale_and_one_that_does_not_tell_them(
    tmp_path: Path, changes: dict[str, object], told: str
) -> None:
    found = age(tmp_path, **changes)

    assert found.stale == told
    assert found.told.endswith(f"0 red of 500 case-seeds; {told}")


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ({"instrument": "F", "tolerances": "g"}, "measured with an older instrument"),
        ({"instrument": "F", "tolerances": "G"}, "measured with older tolerances and an older instrument"),
        ({"instrument": "f"}, "measured with older tolerances"),  # from before they were told
    ],
)
def test_a_soak_of_other_tolerances_or_another_instrument_is_told_to_be_and_stands(
    tmp_path: Path, parts: dict[str, str], told: str
) -> None:
    found = age(tmp_path, parts=parts)

    assert not found.stale
    assert found.told.endswith(f"0 red of 500 case-seeds; {told}")


def test_a_file_that_is_no_report_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cpu_on_cpu\.json: is no report of a soak that this version can read"):
        age(tmp_path, references=None)


def test_what_is_of_today_is_what_the_keys_of_a_run_have() -> None:
    dataset, sources = published(), Sources()
    cases = plan(dataset, {"gemm": ("torch",)}, Selection(definitions=("gemm_n128_k2048",), checks=("numerics",)))
    machine = Machine(measure("cpu", "cpu", sources.distributions), ROOT / "uv.lock")
    keys = Keys(dataset, sources, load_expected(ROOT / "ci/expected_failures.toml", "cpu", "cpu"), machine)
    parts = keys.parts(cases[0])

    assert of_today()["references"][cases[0].definition] == parts["reference"]
    assert of_today()["adapters"][f"{cases[0].op} {cases[0].source}"] == parts["adapter"]
    assert of_today()["parts"].items() <= keys.run_parts.items()


@pytest.mark.parametrize("file", sorted(KEPT.glob("*_on_*.json")), ids=lambda file: file.stem)
def test_a_kept_soak_is_about_todays_references_and_adapters(file: Path) -> None:
    (found,) = (each for each in ages(KEPT, of_today()) if each.file == file)

    assert not found.stale, f"{file.name} is stale, {found.stale}: {found.anew}"


def test_soaks_are_kept() -> None:
    assert list(KEPT.glob("*_on_*.json"))


def test_the_matrix_prints_it(tmp_path: Path) -> None:
    (tmp_path / "soak").mkdir()
    write(tmp_path / "soak")

    done = CliRunner().invoke(
        main, ["matrix", f"--results={tmp_path}", f"--output={tmp_path}", f"--dataset={tmp_path}"]
    )

    assert "3 of its 3 references have changed since; 2 of its 2 adapters have changed since" in done.output

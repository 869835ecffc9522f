"""`refgrid add-reference-tests`: adds what is missing, keeps what is there, changes nothing when run twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from refgrid.cli import main
from refgrid.dataset.case import Selection
from refgrid.dataset.definition import load_dataset
from refgrid.dataset.generate import Request, add_reference_tests, class_name, definitions_with_tests


@pytest.fixture
def two(double: dict[str, Any], write_definition: Any, tmp_path: Path) -> Path:
    """A data set of two definitions."""
    write_definition(double, 1)
    write_definition({**double, "name": "double_n5"}, 1)
    return tmp_path


def _run(root: Path, *arguments: str) -> tuple[int, str]:
    output = str(root / "written")
    result = CliRunner().invoke(main, ["add-reference-tests", "--dataset", str(root), "--output", output, *arguments])
    return result.exit_code, result.output


def test_all_writes_a_class_a_definition_and_then_nothing(two: Path) -> None:
    code, printed = _run(two, "--all")
    file = two / "written" / "test_double.py"
    first = file.read_text()

    assert code == 0, printed
    assert set(definitions_with_tests(two / "written")) == {"double_n4", "double_n5"}
    assert "class TestDoubleN4(ReferenceContract):" in first
    assert 'definition_name = "double_n5"' in first

    assert _run(two, "--all")[0] == 0
    assert file.read_text() == first


def test_the_written_file_is_formatted_and_imports_nothing_else(two: Path) -> None:
    _run(two, "--all")

    text = (two / "written" / "test_double.py").read_text()

    assert text.count("import") == 1
    assert text.endswith('"\n')
    assert "\n\n\nclass" in text
    assert "\n\n\n\n" not in text


@pytest.mark.parametrize("length", [20, 60, 75])
def test_a_long_name_makes_no_line_too_long(
    double: dict[str, Any], write_definition: Any, tmp_path: Path, length: int
) -> None:
    name = "double_" + "n" * (length - 7)
    write_definition({**double, "name": name}, 1)

    add_reference_tests(load_dataset(tmp_path), [name], Request(Selection(), tmp_path / "written"))

    text = (tmp_path / "written" / "test_double.py").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("eld against every source of") == 1
    assert (f'"""{name}, held' in text) == (length < 40)


def test_what_somebody_wrote_is_kept(two: Path) -> None:
    file = two / "written" / "test_double.py"
    file.parent.mkdir()
    own = 'ANSWER = 42\n\n\nclass TestMine:\n    definition_name = "double_n4"\n    tolerance = 0.5\n'
    file.write_text(own)

    _run(two, "--all")

    assert file.read_text().startswith(own)
    assert 'definition_name = "double_n5"' in file.read_text()


def test_force_replaces_the_class_in_place_and_only_that(two: Path) -> None:
    _run(two, "--all")
    file = two / "written" / "test_double.py"
    file.write_text(file.read_text() + "\n\nANSWER = 42\n")

    _run(two, "--definition-name", "double_n4", "--force", "--tolerance", "0.25", "--test-sizes", "small")

    text = file.read_text()
    assert text.endswith("ANSWER = 42\n")
    assert text.count("tolerance = 0.25") == 1
    assert text.count('test_sizes = ("small",)') == 1
    assert text.index("TestDoubleN4") < text.index("tolerance = 0.25") < text.index("TestDoubleN5")


def test_sizes_and_tolerance_are_written(two: Path) -> None:
    _run(two, "--op-type", "double", "--test-sizes", "medium,small", "--tolerance", "1e-3")

    text = (two / "written" / "test_double.py").read_text()

    assert text.count('    test_sizes = ("small", "medium")\n') == 2
    assert text.count("    tolerance = 0.001") == 2


def test_coverage_counts_what_was_there_and_what_is_missing(two: Path) -> None:
    request = Request(Selection(definitions=("double_n4",)), two / "written")

    coverage = add_reference_tests(load_dataset(two), [], request)

    assert coverage.row("double") == (2, 1, 0, 1)
    again = add_reference_tests(load_dataset(two), [], request)
    assert again.row("double") == (2, 0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        pytest.param([], "give exactly one of --definition-name N, --op-type T and --all", id="none"),
        pytest.param(["--all", "--op-type", "double"], "give exactly one of", id="two"),
        pytest.param(["--definition-name", "rmsnorm_h1"], "legal values: double_n4, double_n5", id="unknown name"),
        pytest.param(["--op-type", "gemm"], "legal values: double", id="unknown op_type"),
        pytest.param(["--all", "--test-sizes", "tiny"], "legal values: small, medium, large", id="unknown size"),
        pytest.param(["--all", "--tolerance", "-1"], "is not in the range x>=0", id="negative tolerance"),
    ],
)
def test_a_wrong_option_names_the_legal_values(two: Path, arguments: list[str], told: str) -> None:
    code, printed = _run(two, *arguments)

    assert code == 2
    assert told in " ".join(printed.split())


def test_a_broken_definition_is_reported_and_stops_nobody_else(two: Path, write_definition: Any) -> None:
    write_definition("{", name="broken")

    code, printed = _run(two, "--all")

    assert code == 1
    assert "broken.json: file: Invalid JSON" in printed
    assert set(definitions_with_tests(two / "written")) == {"double_n4", "double_n5"}


def test_class_names_are_pythons() -> None:
    assert class_name("gqa_paged_decode_h32_kv8_d128_ps1") == "TestGqaPagedDecodeH32Kv8D128Ps1"


def test_every_definition_of_this_data_set_has_its_class() -> None:
    root = Path(__file__).resolve().parents[1]

    assert set(definitions_with_tests(root / "tests" / "references")) == set(load_dataset(root).definitions)

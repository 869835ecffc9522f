"""The matrix by definition: a row for each, what its twin proved beside it, and what was cut to fit into memory."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import CPU, H200, Told, case, cases, printed, run
from rich.console import Console

from refgrid.records.record import Verdict
from refgrid.report.matrix import Matrix, build, to_dict, write_files
from refgrid.report.terminal import print_matrix

TWIN = "num_experts 128 -> 8, hidden_size 5120 -> 640"
PUBLISHED = {"gemm_n4": "gemm", "rmsnorm_n4": "rmsnorm", "moe_n4": "moe"}


@pytest.fixture
def matrix() -> Matrix:
    """A gemm proven on two machines, and a moe whose weights fit on one of them only; rmsnorm was never run."""
    own, of_twin = case(op="moe"), replace(case(op="moe"), twin=TWIN)
    lack = "weights of 7.5 GiB are held 2 times, as drawn and as handed out; 2.0 GiB are free for this worker"
    cpu: dict[object, Told] = {**dict.fromkeys(cases(3), Verdict.MATCH), own: (Verdict.NOT_RUN, lack)}
    cpu[of_twin] = Verdict.MATCH
    gpu = {case(): Verdict.MISMATCH, own: Verdict.MATCH, of_twin: Verdict.MATCH}
    runs = [run(cpu, comparisons=({"headroom": 0.25},)), run(gpu, environment=H200)]  # type: ignore[arg-type]
    return build(runs, published=PUBLISHED)


def by_name(matrix: Matrix, definition: str, twin: str = "") -> list[str]:
    (row,) = [row for row in matrix.definitions if (row.definition, row.twin) == (definition, twin)]
    return [cell.text for cell in row.cells]


def terminal(matrix: Matrix, width: int = 100) -> str:
    file = io.StringIO()
    print_matrix(matrix, Console(file=file, width=width, color_system=None), Path(os.devnull), by_definition=True)
    return file.getvalue()


def test_every_definition_has_a_row_by_op_type_and_name_and_its_twin_below(matrix: Matrix) -> None:
    names = [(row.op_type, row.definition, row.twin) for row in matrix.definitions]

    assert names == [
        *(("gemm", "gemm_n4", ""), ("moe", "moe_n4", ""), ("moe", "moe_n4", TWIN)),
        ("rmsnorm", "rmsnorm_n4", ""),
    ]


def test_what_did_not_fit_shows_the_twins_results_beside_it(matrix: Matrix) -> None:
    assert by_name(matrix, "moe_n4") == ["1 not-run", "1 match"]
    assert by_name(matrix, "moe_n4", TWIN) == ["1 match", "1 match"]


def test_a_definition_that_nobody_planned_is_no_blank(matrix: Matrix) -> None:
    assert by_name(matrix, "rmsnorm_n4") == ["not planned", "not planned"]
    assert [cell.colour for cell in matrix.definitions[-1].cells] == ["yellow", "yellow"]


def test_rows_by_definition_and_by_op_count_the_same_cases(matrix: Matrix) -> None:
    counted = sum(cell.planned for row in matrix.definitions for cell in row.cells)

    assert counted == sum(matrix.counts.values()) == 8


def test_a_definition_of_a_record_that_is_published_no_more_keeps_its_row() -> None:
    matrix = build([run({case(): Verdict.MATCH})], published={"rmsnorm_n4": "rmsnorm"})

    assert [row.definition for row in matrix.definitions] == ["gemm_n4", "rmsnorm_n4"]


def test_the_terminal_shows_them_by_op_type(matrix: Matrix) -> None:
    lines = [" ".join(line.split()) for line in terminal(matrix).splitlines()]

    start = next(number for number, line in enumerate(lines) if line.startswith("─")) + 1
    assert [line for line in lines[start : start + 9] if line] == [
        *("gemm", "gemm_n4 ✓ 3 match · 25% ✗ 1 mismatch"),
        *("moe", "moe_n4 ? 1 not-run ✓ 1 match", "~twin ✓ 1 match · 25% ✓ 1 match"),
        *("rmsnorm", "rmsnorm_n4 ? not planned ? not planned"),
    ]
    assert "held against" not in terminal(matrix)


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_longer_than_the_terminal_and_no_verdict_is_lost(matrix: Matrix, width: int) -> None:
    text = terminal(matrix, width)

    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "mismatch" in re.sub(r"\s", "", text)


class TestCut:
    @pytest.fixture
    def cut(self) -> Matrix:
        told: dict[object, Told] = dict.fromkeys(cases(3), Verdict.MATCH)
        shrunk = {"num_pages": (989669, 61854)}
        whole = run({case(op="rmsnorm"): Verdict.MATCH}, environment=CPU)
        return build([run(told, shrunk=shrunk, started="2026-11-20T06:00:00+00:00"), whole])  # type: ignore[arg-type]

    def test_the_matrix_says_how_many_and_from_what_to_what(self, cut: Matrix) -> None:
        note = "3 outcomes at sizes cut to fit into memory, such as gemm_n4-m0-torch: num_pages 989669 -> 61854"

        assert note in cut.columns[0].notes
        assert "3 outcomes at sizes cut to fit into memory" in " ".join(printed(cut).split())

    def test_the_rows_count_theirs(self, cut: Matrix) -> None:
        assert {row.definition: row.cells[0].shrunk for row in cut.definitions} == {"gemm_n4": 3, "rmsnorm_n4": 0}
        assert "gemm_n4 ✓ 3 match · 3 cut to fit" in " ".join(terminal(cut).split())
        assert [row.cells[0].shrunk for row in cut.rows if row.against is None] == [3, 0]


class TestFiles:
    def test_json_holds_the_same(self, matrix: Matrix, tmp_path: Path) -> None:
        read = json.loads(write_files(matrix, tmp_path)[1].read_text())["definitions"]

        assert read == json.loads(json.dumps(to_dict(matrix)["definitions"]))
        assert [(row["op_type"], row["definition"], row["twin"]) for row in read][1:3] == [
            *(("moe", "moe_n4", ""), ("moe", "moe_n4", TWIN))
        ]
        assert read[1]["cells"][0]["verdicts"] == {"not-run": 1}
        assert read[0]["cells"][0]["headroom"] == 0.25
        assert read[0]["cells"][0]["shrunk"] == 0

    def test_markdown_has_a_row_for_each(self, matrix: Matrix, tmp_path: Path) -> None:
        text = write_files(matrix, tmp_path)[0].read_text()
        lines = text[text.index("## Definitions") : text.index("## Reasons")].splitlines()

        assert sum(line.startswith("| ") for line in lines) == 1 + len(matrix.definitions)
        assert "| moe | moe\\_n4 |  | ? 1 not-run | ✓ 1 match |" in lines
        assert (
            "| moe | moe\\_n4 | num\\_experts 128 -\\> 8, hidden\\_size 5120 -\\> 640 | ✓ 1 match · 25% | ✓ 1 match |"
            in lines
        )

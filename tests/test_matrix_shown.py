"""The matrix as it is printed and written: whole at every width, and with its evidence."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_runs import CPU, H200, NEEDS_GPU, NEW, OLD, Told, all_are, case, cases, printed, run

from refgrid.dataset.case import Case
from refgrid.records.record import Run, Verdict
from refgrid.report.matrix import Matrix, build, to_dict, write_files


def wide_runs() -> list[Run]:
    """Five environments with every verdict and the longest words."""
    told: dict[Case, Told] = {
        of: (verdict, f"reason of {verdict.value}") for of, verdict in zip(cases(18), Verdict, strict=True)
    }
    told |= {case("flashinfer-fa3", "gqa_paged_prefill_causal", i): Verdict.NONDETERMINISTIC for i in range(999)}
    libraries = {"flashinfer-python": "0.6.12.post1", "sgl-kernel": "0.3.20", "transformers": "4.57.1"}
    kinds = (
        "NVIDIA H200",
        "NVIDIA B200",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA RTX PRO 6000 Blackwell",
    )
    environments = [CPU, *(replace(H200, gpu=gpu, libraries=libraries) for gpu in kinds)]
    return [run(told, environment=e) for e in environments]


@pytest.fixture
def wide() -> Matrix:
    """These, and an environment without records."""
    return build(wide_runs(), {"cu126": NEEDS_GPU})


class TestPrinted:
    @pytest.mark.parametrize("width", [60, 80, 100, 140, 300])
    def test_every_verdict_is_whole_and_no_line_is_too_long(self, wide: Matrix, width: int) -> None:
        text = printed(wide, width)
        table = text[: text.index("reasons, worst first")]

        assert "…" not in table
        assert max(map(len, text.splitlines())) <= width
        for column in wide.columns[:-1]:
            assert table.count(column.title.split()[0]) >= 1
        for verdict in Verdict:
            assert len(re.findall(rf"(?<![\w-]){verdict.value}(?![\w-])", table)) >= 5

    @pytest.mark.parametrize("width", range(20, 120))
    @pytest.mark.parametrize("op", ["a", "gqa_paged_decode"])
    def test_nothing_is_cut_off_at_any_width(self, op: str, width: int) -> None:
        declared = {"cu130": "wheels laid by hand over 2.11.0+cu130", "cu126": "wheels laid by hand over 2.6.0+cu126"}
        text = printed(build([run({case(op=op): Verdict.NONDETERMINISTIC})], declared), width)
        table = re.sub(r"\s", "", text[: text.index("✓ all proven")])

        assert "…" not in text
        assert table.count("hand") == table.count("laid")
        assert (table.count("+cu130") == 1) == ("laid" in table)
        if width >= 40:
            assert "1 nondeterministic" in text

    def test_reads_without_colour_and_without_unicode(self, wide: Matrix) -> None:
        text = printed(wide, encoding="ascii")

        assert "X 999" in text
        assert "ok all proven   ? something not proven   X something wrong" in text

    def test_the_head_of_a_column_says_what_was_measured_and_when(self) -> None:
        text = printed(build([run({case(): Verdict.MATCH}, environment=H200)]))

        head = text[: text.index("─")]
        words = (
            "cu130 on NVIDIA H200",
            "torch 2.11.0",
            "CUDA 13.0",
            "driver 580.95.05",
            "transformers 4.57.1",
        )
        assert [word for word in (*words, "2026-11-20") if word not in head] == []

    def test_the_whole_of_a_small_matrix(self) -> None:
        told: dict[Case, Told] = {
            **all_are(Verdict.MATCH, cases(3)),
            case("flashinfer"): (Verdict.MISSING, "flashinfer-python is not installed"),
        }
        lines = [line.rstrip() for line in printed(build([run(told)]), 60).splitlines()]

        assert lines == [
            "                 cpu on CPU",
            "                 torch 2.13.0",
            "op               transformers 4.57.1",
            "  held against   2026-11-20",
            "─────────────────────────────────────",
            "gemm             ? 1 missing, 3 match",
            "  flashinfer     ? 1 missing",
            "  torch          ✓ 3 match",
            "✓ all proven   ? something not proven   ✗ something wrong",
            "· N%: largest error over allowance",
            "reasons, worst first",
            "? 1 missing · cpu on CPU · flashinfer",
            "    flashinfer-python is not installed (e.g.",
            "    gemm_n4-m1-flashinfer)",
            "planned 4 = accounted 4: 1 missing, 3 match",
        ]


class TestFiles:
    def test_json_reads_back_and_names_its_evidence(self, wide: Matrix, tmp_path: Path) -> None:
        markdown, plain = write_files(wide, tmp_path / "deep")
        read = json.loads(plain.read_text())

        assert (markdown.name, plain.name) == ("matrix.md", "matrix.json")
        assert read == json.loads(json.dumps(to_dict(wide)))
        assert (read["exit_code"], read["planned"]) == (1, 5 * (18 + 999))
        column = read["columns"][0]
        assert column["environment"]["torch"] == "2.13.0"
        assert column["dates"] == [NEW, NEW]
        assert column["runs"][0]["file"] == "results/new.jsonl"
        assert read["columns"][-1] == {
            "title": "cu126",
            "environment": None,
            "dates": None,
            "reason": NEEDS_GPU,
            "findings": [],
            "notes": [],
            "planned": 0,
            "runs": [],
        }
        assert read["rows"][0]["cells"][0]["verdicts"]["mismatch"] == 1
        assert len(read["reasons"]) == 5 * 19

    def test_markdown_tables_have_equal_rows(self, tmp_path: Path) -> None:
        hostile = build([*wide_runs(), run({case(op="a|b"): (Verdict.ERROR, "x | y\n| z")})])
        text = write_files(hostile, tmp_path)[0].read_text()
        tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]

        assert len(tables) == 4
        for table in tables:
            assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1
            assert re.fullmatch(r"(\|-+)+\|", table[1])
        assert len(tables[1]) == 2 + len(hostile.rows)
        assert len(tables[2]) == 2 + len(hostile.definitions)
        assert "x \\| y \\| z" in text
        assert hostile.summary in text

    def test_notes_are_in_the_markdown(self, tmp_path: Path) -> None:
        matrix = build([run(all_are(Verdict.MATCH, cases(2)), started=OLD), run({})])

        assert "- cpu on CPU: run new of 2026-11-20 planned no case" in write_files(matrix, tmp_path)[0].read_text()

    def test_a_failed_write_leaves_the_old_file_whole(
        self, wide: Matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_files(build([run({case(): Verdict.MATCH})]), tmp_path)
        before = (tmp_path / "matrix.md").read_bytes()
        write = Path.write_text

        def half(self: Path, data: str, **kwargs: Any) -> int:
            write(self, data[: len(data) // 2], **kwargs)
            raise OSError("No space left on device")

        monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            write_files(wide, tmp_path)

        assert (tmp_path / "matrix.md").read_bytes() == before
        assert sorted(file.name for file in tmp_path.iterdir()) == ["matrix.json", "matrix.md"]


class TestFindings:
    """What the audit found stands in the head of the column, in the terminal and in both files."""

    def of(self, finding: str, **run_of: Any) -> Run:
        found = run(all_are(Verdict.MATCH, cases(3)), **run_of)
        return replace(found, header=replace(found.header, findings=(finding,)), late_findings=("late: norm",))

    def test_they_are_shown_everywhere(self, tmp_path: Path) -> None:
        matrix = build([self.of("nvcc is of CUDA 12.8")])

        markdown, plain = (file.read_text() for file in write_files(matrix, tmp_path))
        assert "! 2 findings" in printed(matrix)
        assert "! cpu on CPU: nvcc is of CUDA 12.8" in printed(matrix)
        assert "| nvcc is of CUDA 12.8; late: norm |" in markdown
        assert json.loads(plain)["columns"][0]["findings"] == ["nvcc is of CUDA 12.8", "late: norm"]

    def test_those_of_an_older_run_stand_as_long_as_an_outcome_of_it(self) -> None:
        older = self.of("nvcc is of CUDA 12.8", started=OLD, name="old")
        newer = run(all_are(Verdict.MATCH, cases(3)[:1]))

        assert build([older, newer]).columns[0].findings == ()
        assert "run old of 2026-08-01: nvcc is of CUDA 12.8" in build([older, newer]).columns[0].notes
        assert build([older, run(all_are(Verdict.MATCH, cases(3)))]).columns[0].notes == ()

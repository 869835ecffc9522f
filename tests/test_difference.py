"""Where two environments of one machine ended differently, in a line each; no evidence is no difference."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import CPU, H200, all_are, cases, run
from rich.console import Console

from refgrid.records.record import Run, Verdict
from refgrid.report.difference import Difference
from refgrid.report.matrix import build, to_dict, write_files
from refgrid.report.terminal import print_matrix

NEWER = replace(H200, name="cu132")
NEWEST = replace(H200, name="cu140")


def found(*runs: Run) -> tuple[Difference, ...]:
    return build(runs).differences


def test_equal_differences_are_one_line_with_the_reason() -> None:
    same, other = cases(2, "torch"), cases(3, "flashinfer")
    refused = (Verdict.UNSUPPORTED, "Unsupported group_size: 6")

    (line,) = found(
        run(all_are(Verdict.MATCH, same) | all_are(refused, other), environment=H200, name="a"),
        run(all_are(Verdict.MATCH, [*same, *other]), environment=NEWER, name="b"),
        run(all_are(Verdict.MATCH, [*same, *other]), environment=NEWEST, name="c"),
    )

    assert (line.machine, line.ops, line.against, line.count) == ("NVIDIA H200", ("gemm",), "flashinfer", 3)
    assert [side.told for side in line.sides] == [
        "match in cu132 and cu140",
        "unsupported in cu130: Unsupported group_size: 6",
    ]
    assert line.example == other[0].id


def test_reasons_that_differ_in_words_are_lines_of_their_own() -> None:
    one, two = cases(2, "flashinfer")

    lines = found(
        run({one: (Verdict.MISMATCH, "out is off"), two: (Verdict.MISMATCH, "lse is off")}, environment=H200, name="a"),
        run(all_are(Verdict.MATCH, [one, two]), environment=NEWER, name="b"),
    )

    assert [line.count for line in lines] == [1, 1]
    assert {line.sides[1].reason for line in lines} == {"out is off", "lse is off"}


def test_what_an_environment_lacks_is_told_once_and_apart() -> None:
    same, refused, other = cases(2, "sglang"), cases(3, "sglang", op="rmsnorm"), cases(1, "sglang", op="rope")
    lacking, unfit = (Verdict.MISSING, "sglang is not installed"), (Verdict.UNSUPPORTED, "page_size is 1")

    lines = found(
        run(all_are(Verdict.MATCH, [*same, *other]) | all_are(unfit, refused), environment=H200, name="a"),
        run(all_are(Verdict.MATCH, [*same, *other, *refused]), environment=NEWER, name="b"),
        run(all_are(lacking, [*same, *other, *refused]), environment=NEWEST, name="c"),
    )

    assert [(line.where, line.count, line.told) for line in lines] == [
        ("gemm, rmsnorm, rope", 6, "missing in cu140: sglang is not installed"),
        ("rmsnorm", 3, "match in cu132; unsupported in cu130: page_size is 1"),
    ]


def test_what_all_lack_is_no_difference() -> None:
    (of,) = cases(1)

    assert not found(
        run({of: (Verdict.MISSING, "too old")}, environment=H200, name="a"),
        run({of: (Verdict.MISSING, "not installed")}, environment=NEWER, name="b"),
    )


def test_an_expected_failure_is_told_by_its_entry_alone() -> None:
    one, two = cases(2)
    entry = "the library doubles (twice) (https://example.org/1)"

    (line,) = found(
        run(
            {
                one: (Verdict.EXPECTED, f"{entry}: y is off at [1] (atol 1)"),
                two: (Verdict.EXPECTED, f"{entry}: z is nan"),
            },
            environment=H200,
            name="a",
        ),
        run(all_are(Verdict.MATCH, [one, two]), environment=NEWER, name="b"),
    )

    assert line.count == 2
    assert line.told == f"match in cu132; expected in cu130: {entry}"


@pytest.mark.parametrize("silent", [Verdict.NOT_RUN, None])
def test_a_case_that_was_not_run_says_nothing(silent: Verdict | None) -> None:
    (of,) = cases(1)
    other = {of: silent} if silent else {}

    assert not found(
        run({of: Verdict.MATCH}, environment=H200, name="a"),
        run(other, environment=NEWER, name="b", planned=[of] if silent else []),  # type: ignore[arg-type] # nothing told
    )


@pytest.mark.parametrize("beside", [None, "NVIDIA H200"])
def test_machines_of_another_kind_are_not_compared(beside: str | None) -> None:
    """Neither is a CPU, whatever GPU its machine has beside it: the matrix of an H200 has a column of its CPU, too."""
    (of,) = cases(1)

    assert not found(
        run({of: Verdict.MATCH}, environment=replace(CPU, gpu=beside), name="a"),
        run({of: Verdict.MISMATCH}, environment=H200, name="b"),
    )


def test_the_cpus_of_two_machines_are_compared_whatever_gpu_is_beside_them() -> None:
    (of,) = cases(1)

    (line,) = found(
        run({of: Verdict.MATCH}, environment=replace(CPU, gpu="NVIDIA H200"), name="a"),
        run({of: Verdict.MISMATCH}, environment=replace(CPU, name="other"), name="b"),
    )

    assert line.machine == "CPU"
    assert replace(CPU, gpu="NVIDIA H200").title == CPU.title


def test_cached_is_the_match_that_it_is() -> None:
    (of,) = cases(1)

    assert not found(
        run({of: Verdict.CACHED}, environment=H200, name="a"), run({of: Verdict.MATCH}, environment=NEWER, name="b")
    )


def test_the_matrix_shows_them_everywhere(tmp_path: Path) -> None:
    (of,) = cases(1)
    matrix = build(
        [
            run({of: Verdict.MATCH}, environment=H200, name="a"),
            run({of: (Verdict.MISMATCH, "out [0] is 1 | 2")}, environment=NEWER, name="b"),
        ]
    )
    printed = io.StringIO()
    print_matrix(matrix, Console(file=printed, width=200), Path(os.devnull))
    write_files(matrix, tmp_path)

    assert "NVIDIA H200 · gemm · torch · 1 cases: match in cu130; mismatch in cu132: out [0] is 1 | 2" in (
        printed.getvalue()
    )
    (told,) = json.loads((tmp_path / "matrix.json").read_text())["differences"]
    assert told == json.loads(json.dumps(to_dict(matrix)["differences"][0]))
    assert [side["verdict"] for side in told["sides"]] == ["match", "mismatch"]
    assert "match in cu130; mismatch in cu132: out \\[0\\] is 1 \\| 2" in (tmp_path / "matrix.md").read_text()

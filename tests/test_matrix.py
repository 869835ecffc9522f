"""The matrix of hand-made runs: what stands, what cells say, and that nothing looks proven that is not."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from made_runs import BROKEN, CPU, H200, NEEDS_GPU, NEW, OLD, Told, all_are, case, cases, cell, names, printed, run

from refgrid.dataset.case import Case
from refgrid.records.record import BY_HAND, Run, Verdict
from refgrid.report.cell import Cell
from refgrid.report.matrix import build, to_dict
from refgrid.report.reason import without_numbers


class TestCells:
    @pytest.mark.parametrize(
        ("told", "text", "colour"),
        [
            pytest.param([(412, Verdict.MATCH)], "412 match", "green", id="all match"),
            pytest.param([(409, Verdict.MATCH), (3, Verdict.MISMATCH)], "3 mismatch, 409 match", "red", id="a red one"),
            pytest.param([(412, Verdict.MISSING)], "412 missing", "yellow", id="no library"),
            pytest.param(
                [(208, Verdict.MATCH), (204, Verdict.MISSING)],
                "204 missing, 208 match",
                "yellow",
                id="half proven",
            ),
            pytest.param(
                [(2, Verdict.EXPECTED), (1, Verdict.CACHED)],
                "2 expected, 1 cached",
                "green",
                id="green words",
            ),
            pytest.param([(1, Verdict.NOT_RUN)], "1 not-run", "yellow", id="not run"),
            pytest.param(
                [(1, Verdict.OOM), (9, Verdict.MISSING)], "1 oom, 9 missing", "red", id="no memory is no skip"
            ),
        ],
    )
    def test_say_how_many_ended_how(self, told: list[tuple[int, Verdict]], text: str, colour: str) -> None:
        words = [word for count, word in told for _ in range(count)]
        matrix = build([run(dict(zip(cases(len(words)), words, strict=True)))])

        assert (cell(matrix, against="torch").text, cell(matrix, against="torch").colour) == (text, colour)
        assert cell(matrix) == cell(matrix, against="torch")

    @pytest.mark.parametrize("verdict", list(Verdict), ids=lambda verdict: verdict.value)
    def test_have_the_colour_of_their_worst_verdict(self, verdict: Verdict) -> None:
        assert Cell({Verdict.MATCH: 400, verdict: 1}).colour == verdict.colour

    def test_a_cell_that_nobody_planned_is_no_pass(self) -> None:
        on_gpu = run(all_are(Verdict.MATCH, cases(1)), environment=H200)
        more = build([run(all_are(Verdict.MATCH, cases(2))), on_gpu, run({case(op="rmsnorm"): Verdict.MATCH})])

        blank = cell(more, "rmsnorm", column=1)
        assert (blank.text, blank.colour, blank.planned) == ("not planned", "yellow", 0)
        assert re.search(r"rmsnorm +✓ 1 match +\? not planned", printed(more))

    def test_the_op_sums_its_parts(self) -> None:
        told: dict[Case, Told] = {
            **all_are(Verdict.MATCH, cases(3)),
            **all_are(Verdict.MISSING, cases(2, "flashinfer")),
            **all_are(Verdict.MATCH, [case("shape"), case("dtype"), case("determinism"), case("agreement")]),
        }
        matrix = build([run(told)])

        assert cell(matrix).text == "2 missing, 7 match"
        assert cell(matrix, against="itself").text == "3 match"
        assert cell(matrix, against="agreement").text == "1 match"

    def test_a_case_without_a_source_and_a_broken_file_have_rows(self) -> None:
        alone = Case("gemm_n4", "gemm", "gemm", "m1", "numerics")
        matrix = build([run({alone: Verdict.NO_GROUND_TRUTH, replace(BROKEN, definition="gemm_n5"): Verdict.ERROR})])

        assert names(matrix.rows) == ["gemm", "gemm/definition", "gemm/ground truth"]
        assert cell(matrix, against="ground truth").text == "1 no-ground-truth"

    def test_show_the_worst_headroom_where_a_source_was_matched_throughout(self) -> None:
        def compared(of: Case, headroom: Any, verdict: Verdict = Verdict.MATCH) -> Run:
            return run({of: verdict}, planned=cases(3), comparisons=({"headroom": 0.01}, {"headroom": headroom}))

        runs = [compared(of, headroom) for of, headroom in zip(cases(3), (0.2, 0.604, None), strict=True)]
        matrix = build(runs)

        assert (cell(matrix).headroom, cell(matrix).headroom_case) == (0.604, "gemm_n4-m1-torch")
        assert "✓ 3 match · 61%" in printed(matrix)
        assert printed(matrix).count("· 61%") == 1

    def test_a_headroom_that_is_no_number_is_the_worst_and_fits_into_json(self) -> None:
        matrix = build([run({case(): Verdict.MISMATCH}, comparisons=({"headroom": "nan"}, {"headroom": 3.0}))])

        assert cell(matrix).headroom == float("inf")
        assert to_dict(matrix)["rows"][0]["cells"][0]["headroom"] == "inf"


class TestWhatStands:
    def test_the_newest_run_wins_whatever_order_it_is_read_in(self) -> None:
        runs = [
            run(all_are(Verdict.MATCH, cases(2)), started=NEW),
            run(all_are(Verdict.CRASH, cases(2)), started=OLD),
        ]

        for given in (runs, runs[::-1]):
            assert cell(build(given)).text == "2 match"
            assert build(given).columns[0].notes == ()

    def test_a_newer_red_replaces_an_older_match(self) -> None:
        runs = [run({case(): Verdict.MATCH}, started=OLD), run({case(): Verdict.MISMATCH}, started=NEW)]

        assert build(runs).exit_code == 1

    def test_a_tolerance_set_by_hand_is_said(self) -> None:
        given = run({case(): (Verdict.MATCH, BY_HAND.format("1"))}, started=NEW)

        assert build([given]).columns[0].notes == ("1 outcome under a tolerance set by hand, not the table's",)

    def test_an_empty_newer_run_replaces_nothing(self) -> None:
        matrix = build([run(all_are(Verdict.MATCH, cases(2)), started=OLD, name="old"), run({}, started=NEW)])

        assert cell(matrix).text == "2 match"
        assert matrix.columns[0].dates == (OLD, OLD)
        assert matrix.columns[0].notes == ("run new of 2026-11-20 planned no case and replaces nothing",)

    def test_a_partial_newer_run_keeps_what_it_did_not_plan(self) -> None:
        older = run(all_are(Verdict.MISMATCH, cases(4)), started=OLD, name="old")
        matrix = build([older, run(all_are(Verdict.MATCH, cases(1)), started=NEW)])

        assert cell(matrix).text == "3 mismatch, 1 match"
        assert matrix.columns[0].dates == cell(matrix).dates == (OLD, NEW)
        assert matrix.columns[0].notes == ("3 outcomes of run old of 2026-08-01 stand, no newer run has them",)
        assert "2026-08-01 to" in printed(matrix)

    def test_a_killed_newer_run_keeps_what_it_did_not_reach(self) -> None:
        older = run(all_are(Verdict.MATCH, cases(3)), started=OLD, name="old")
        killed = run({case(workload=0): Verdict.MISMATCH}, planned=cases(5), finished=False)
        matrix = build([older, killed])

        assert cell(matrix).text == "1 mismatch, 2 not-run, 2 match"
        assert matrix.summary == "planned 5 = accounted 5: 1 mismatch, 2 not-run, 2 match"
        assert matrix.columns[0].notes == (
            "2 outcomes of run old of 2026-08-01 stand, no newer run has them",
            "run new of 2026-11-20 left 4 of 5 cases not-run; 2 keep the outcome of an older run",
        )

    def test_an_interrupted_newer_run_that_closed_its_cases_is_no_different(self) -> None:
        older = run(all_are(Verdict.MATCH, cases(3)), started=OLD, name="old")
        told: dict[Case, Told] = {
            **all_are((Verdict.NOT_RUN, "interrupted"), cases(3)),
            case(workload=0): Verdict.MATCH,
        }
        matrix = build([older, run(told)])

        assert cell(matrix).text == "3 match"
        assert matrix.columns[0].notes[1].startswith("run new of 2026-11-20 left 2 of 3 cases not-run")

    def test_a_run_that_made_up_for_a_killed_one_ends_the_talk_of_it(self) -> None:
        killed = run({}, planned=cases(3), started=OLD, finished=False, name="old")
        matrix = build([killed, run(all_are(Verdict.MATCH, cases(3)))])

        assert (cell(matrix).text, matrix.columns[0].notes) == ("3 match", ())

    def test_two_killed_runs_prove_no_more_than_one(self) -> None:
        killed = [run({}, planned=cases(2), started=started, finished=False) for started in (OLD, NEW)]
        matrix = build(killed)

        assert (cell(matrix).text, matrix.exit_code) == ("2 not-run", 2)
        assert matrix.columns[0].notes == ("run new of 2026-11-20 left 2 of 2 cases not-run",)

    def test_a_killed_run_alone_is_not_run_and_proves_nothing(self) -> None:
        matrix = build([run({}, planned=cases(3), finished=False)])

        assert cell(matrix).text == "3 not-run"
        assert cell(matrix).dates is None
        assert matrix.exit_code == 2
        assert matrix.reasons[0].text == "the run ended before its turn"

    def test_an_older_outcome_says_what_it_was_measured_with(self) -> None:
        before = replace(H200, torch="2.10.0", libraries={"flashinfer-python": "0.6.12"})
        after = replace(H200, libraries={"flashinfer-python": "0.6.13"})
        older = run(all_are(Verdict.MATCH, cases(2)), started=OLD, name="old", environment=before)
        matrix = build([older, run({case(op="rmsnorm"): Verdict.MATCH}, environment=after)])

        assert matrix.columns[0].environment == after
        (note,) = matrix.columns[0].notes
        assert note == (
            "2 outcomes of run old of 2026-08-01 stand, no newer run has them, "
            "measured with torch 2.10.0 and flashinfer-python 0.6.12"
        )

    def test_an_older_outcome_of_another_reference_text_is_counted(self) -> None:
        older = run(all_are(Verdict.MATCH, cases(3)), started=OLD, name="old", hashes={"reference": "before"})
        matrix = build([older, run(all_are(Verdict.MATCH, cases(1)), hashes={"reference": "after"})])

        assert matrix.columns[0].notes[0].endswith("2 of them with another text of the reference")

    def test_a_mended_file_loses_its_old_error_and_a_broken_one_its_old_matches(self) -> None:
        broken, whole = {BROKEN: Verdict.ERROR}, all_are(Verdict.MATCH, cases(2))

        mended = build([run({**broken}, started=OLD), run(whole)])
        assert (mended.summary, mended.exit_code) == ("planned 2 = accounted 2: 2 match", 0)
        assert mended.columns[0].notes == (
            "1 older outcome left out: the definition's file was broken since, or has been mended",
        )

        damaged = build([run(whole, started=OLD), run({**broken})])
        assert (damaged.summary, damaged.exit_code) == ("planned 1 = accounted 1: 1 error", 1)

    def test_a_killed_run_does_not_mend_a_file(self) -> None:
        killed = run({}, planned=cases(2), finished=False)

        assert build([run({BROKEN: Verdict.ERROR}, started=OLD), killed]).summary == (
            "planned 3 = accounted 3: 1 error, 2 not-run"
        )

    def test_machine_kinds_are_columns_of_their_own(self) -> None:
        b200 = replace(H200, gpu="NVIDIA B200")
        matrix = build([run({case(): Verdict.MATCH}, environment=e) for e in (H200, b200, CPU)])

        assert [column.title for column in matrix.columns] == [
            "cpu on CPU",
            "cu130 on NVIDIA B200",
            "cu130 on NVIDIA H200",
        ]


class TestDeclared:
    def test_an_environment_without_records_says_why(self) -> None:
        matrix = build([run({case(): Verdict.MATCH})], {"cpu": "unused", "cu130": NEEDS_GPU})

        assert [column.title for column in matrix.columns] == ["cpu on CPU", "cu130"]
        assert (cell(matrix, column=1).text, cell(matrix, column=1).colour) == ("not run", "yellow")
        assert matrix.exit_code == 0
        for word in NEEDS_GPU.split():
            assert word in printed(matrix)

    def test_one_that_cannot_be_resolved_any_more_says_so_in_every_cell(self) -> None:
        why = "unresolvable: there is no version of apache-tvm-ffi==0.1.0b15"
        matrix = build([run({case(): Verdict.MATCH})], {"cu128": why})

        assert (cell(matrix, column=1).text, cell(matrix, column=1).colour) == ("unresolvable", "yellow")
        assert matrix.exit_code == 0

    def test_those_that_do_not_fit_beside_the_others_say_why_in_a_line_each(self) -> None:
        matrix = build([run({case(): Verdict.MATCH})], {f"cu13{i}": "needs an NVIDIA GPU" for i in range(9)})
        text = printed(matrix)

        assert text.count("held against") == 1
        assert "? cu138: needs an NVIDIA GPU\n" in text

    def test_without_any_record_nothing_is_proven(self) -> None:
        matrix = build([], {"cu130": NEEDS_GPU})

        assert matrix.exit_code == 2
        assert printed(matrix) == (f"? cu130: {NEEDS_GPU}\nplanned 0 = accounted 0: nothing; nothing was proven\n")


class TestWorstFirst:
    def test_ops_and_their_parts(self) -> None:
        told: dict[Case, Told] = {
            case("torch", "a_green"): Verdict.MATCH,
            case("torch", "b_yellow"): Verdict.MATCH,
            case("flashinfer", "b_yellow"): Verdict.MISSING,
            case("torch", "c_red"): Verdict.MATCH,
            case("sglang", "c_red"): Verdict.MISSING,
            case("flashinfer", "c_red"): Verdict.MISMATCH,
            case("torch", "d_crash"): Verdict.CRASH,
        }
        assert names(build([run(told)]).rows) == [
            *("d_crash", "d_crash/torch"),
            *("c_red", "c_red/flashinfer", "c_red/sglang", "c_red/torch"),
            *("b_yellow", "b_yellow/flashinfer", "b_yellow/torch"),
            *("a_green", "a_green/torch"),
        ]

    def test_a_red_cell_in_any_column_counts_and_a_column_without_records_does_not(self) -> None:
        green = run({case(op="a"): Verdict.MATCH, case(op="b"): Verdict.MATCH})
        red = run({case(op="b"): Verdict.MISMATCH, case(op="a"): Verdict.MATCH}, environment=H200)

        assert names(build([green, red], {"cu126": "no GPU"}).rows) == ["b", "b/torch", "a", "a/torch"]


class TestReasons:
    def test_reasons_that_differ_in_numbers_are_one_with_a_count_and_an_example(self) -> None:
        told: dict[Case, Told] = {
            of: (Verdict.MISMATCH, f"C is off at [{i}, {7 * i}]: {i}e-3 but should be -{i}.5 (atol 0.001)")
            for i, of in enumerate(cases(400))
        }
        (reason,) = build([run(told)]).reasons

        assert (reason.count, reason.example, reason.against) == (400, "gemm_n4-m0-torch", "torch")
        assert reason.text == "C is off at [0, 0]: 0e-3 but should be -0.5 (atol 0.001)"

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            pytest.param("y.dtype = float16, but", "y.dtype = float32, but", id="dtypes"),
            pytest.param("y.dtype = int32, but", "y.dtype = int64, but", id="integer dtypes"),
            pytest.param("y is nan at [1]", "y is inf at [1]", id="non-finite values"),
        ],
    )
    def test_what_is_no_mere_number_stays_apart(self, one: str, other: str) -> None:
        assert without_numbers(one) != without_numbers(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            pytest.param("[1, 2] of 3.5e-07", "[10, 20, 30] of -4", id="lists and signs"),
            pytest.param("[gqa_h32_kv8, reference]", "[gqa_h20_kv4, reference]", id="constants in names"),
        ],
    )
    def test_numbers_are_all_alike(self, one: str, other: str) -> None:
        assert without_numbers(one) == without_numbers(other)

    def test_a_match_is_listed_only_when_it_says_something(self) -> None:
        told: dict[Case, Told] = {
            case(): Verdict.MATCH,
            case(workload=2): (Verdict.MATCH, "lse: not given by torch"),
        }

        assert [reason.text for reason in build([run(told)]).reasons] == ["lse: not given by torch"]

    def test_a_verdict_without_a_reason_says_that_there_is_none(self) -> None:
        assert build([run({case(): Verdict.CRASH})]).reasons[0].text == "no reason was given"

    def test_twelve_are_printed_and_a_red_one_beyond_is_never_silent(self) -> None:
        told: dict[Case, Told] = {of: (Verdict.MISMATCH, "word " * (i + 1)) for i, of in enumerate(cases(14))}
        told |= {of: (Verdict.MISSING, "gone " * (i + 1)) for i, of in enumerate(cases(3, "flashinfer"))}
        text = printed(build([run(told)]))

        assert text.count("mismatch · cpu on CPU") == 12
        assert "... and 5 more in matrix.json, 2 of them red\n" in text

    def test_brackets_in_a_reason_are_text(self) -> None:
        text = printed(build([run({case(): (Verdict.ERROR, "y[red]x[/] is [bold]off")})]))

        assert "y[red]x[/] is [bold]off" in text


class TestExitCode:
    @pytest.mark.parametrize(
        ("verdicts", "code"),
        [
            pytest.param([Verdict.MATCH], 0, id="all proven"),
            pytest.param([Verdict.MATCH, Verdict.MISSING], 0, id="some proven, none wrong"),
            pytest.param([Verdict.MATCH, Verdict.MISMATCH], 1, id="one wrong"),
            pytest.param([Verdict.MISSING, Verdict.ERROR], 1, id="wrong, none proven"),
            pytest.param([Verdict.MISSING, Verdict.NOT_RUN], 2, id="silence is not success"),
            pytest.param([], 2, id="no case"),
        ],
    )
    def test_says_whether_something_is_wrong_or_nothing_proven(self, verdicts: list[Verdict], code: int) -> None:
        matrix = build([run(dict(zip(cases(len(verdicts)), verdicts, strict=True)))])

        assert matrix.exit_code == code
        assert matrix.summary.endswith("; nothing was proven") == (code == 2)

    def test_a_planned_case_that_is_not_accounted_for_is_an_error(self) -> None:
        matrix = build([run(all_are(Verdict.MATCH, cases(2)))])
        lost = replace(matrix, columns=(replace(matrix.columns[0], planned=3),))

        assert (lost.summary, lost.exit_code) == ("error: planned 3 but accounted 2: 2 match", 1)

    def test_a_case_planned_twice_can_end_only_once_and_is_an_error(self) -> None:
        matrix = build([run({case(): Verdict.MATCH}, planned=[case(), case()])])

        assert (matrix.summary, matrix.exit_code) == ("error: planned 2 but accounted 1: 1 match", 1)

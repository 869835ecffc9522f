"""What a run refuses, cuts or leaves to a twin: one pytest process with 96 MiB for its worker.

The op `linear` adds a weight to its input; reference and sources note each call in calls.log.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from projects import Project

from refgrid.cli import main
from refgrid.records.record import Outcome, Run, Verdict

TESTS = """
from refgrid.contract import ReferenceContract

class TestHuge(ReferenceContract):
    definition_name = "linear_huge"

class TestRest(ReferenceContract):
    pass
"""
HELD = """
import gc
import torch

def pytest_sessionfinish():
    tensors = [tensor.untyped_storage() for tensor in gc.get_objects() if isinstance(tensor, torch.Tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in tensors}
    open("held", "w").write(str(sum(sizes.values())))
"""
CALL = """open("calls.log", "a").write(f"{who} {x.shape[0]} {w.shape[0]}\\n")
y = (x[:, :1] + w[0, 0]).expand(-1, w.shape[0]).contiguous()
"""


def linear(name: str, n: int, k: int, *constraints: str) -> dict[str, Any]:
    """x [m, k], w [n, k] -> y [m, n]."""
    body = CALL.replace("who", "'reference'").replace("\n", "\n    ")
    return {
        "name": name,
        "op_type": "linear",
        "axes": {"m": {"type": "var"}, "n": {"type": "const", "value": n}, "k": {"type": "const", "value": k}},
        "inputs": {"x": {"shape": ["m", "k"], "dtype": "float32"}, "w": {"shape": ["n", "k"], "dtype": "float32"}},
        "outputs": {"y": {"shape": ["m", "n"], "dtype": "float32"}},
        "reference": f"import torch\n\ndef run(x, w):\n    {body}return y\n",
        "constraints": list(constraints),
    }


def write(root: Path, definition: dict[str, Any], *sizes: int) -> None:
    given = {name: {"type": "random"} for name in definition["inputs"]}
    lines = [
        {"definition": definition["name"], "workload": {"uuid": f"m{m}", "axes": {"m": m}, "inputs": given}}
        for m in sizes
    ]
    for folder, name, text in (
        ("definitions", f"{definition['name']}.json", json.dumps(definition)),
        ("workloads", f"{definition['name']}.jsonl", "".join(json.dumps(line) + "\n" for line in lines)),
    ):
        file = root / folder / "linear" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, pristine_double: dict[str, Any]) -> Project:
    root = tmp_path_factory.mktemp("limits")
    made = Project(root, pristine_double, None)
    (root / "test_double.py").unlink()
    (root / "test_linear.py").write_text(TESTS)
    (root / "conftest.py").write_text(HELD)
    source = CALL.replace("who", "'sum'").replace("x,", "x, w,")
    made.truth(linear=f"{source}return {{'y': y}}")
    provider = root / "provider.py"
    provider.write_text(provider.read_text().replace("def truth_of_linear(x)", "def truth_of_linear(x, w)"))
    write(root, linear("linear_odd", 4, 4, "m % 3 != 0"), 2, 3)
    write(root, linear("linear_huge", 2**14, 2**15, "m % 3 != 0"), 2, 3)
    write(root, linear("linear_rigid", 2**14, 2**15, "n * k == 2 ** 29"), 1)
    write(root, linear("linear_long", 8, 8), 1, 4_000_000)
    write(root, linear("linear_heavy", 2**10, 10240), 1, 2, 4)
    made.run("--memory", "96MiB", "--test-sizes", "small,medium,large")
    return made


@pytest.fixture
def run(project: Project) -> Run:
    return project.records()


def outcomes(run: Run, beginning: str) -> list[Outcome]:
    found = [outcome for outcome in run.accounted() if outcome.case.id.startswith(beginning)]
    assert found, f"nothing begins with {beginning}"
    return found


def verdicts(run: Run, beginning: str) -> set[str]:
    return {outcome.verdict.value for outcome in outcomes(run, beginning)}


def calls(project: Project) -> set[tuple[str, int, int]]:
    """Who was called, at which m and n."""
    lines = (line.split() for line in (project.root / "calls.log").read_text().splitlines())
    return {(who, int(m), int(n)) for who, m, n in lines}


class TestForbidden:
    def test_a_forbidden_size_is_an_error_that_says_which_constraint_and_why(self, run: Run) -> None:
        assert verdicts(run, "linear_odd-m2-") == {"match", "missing"}
        for outcome in outcomes(run, "linear_odd-m3-"):
            assert outcome.verdict is Verdict.ERROR
            assert outcome.reason == (
                "definitions/linear/linear_odd.json: constraints: 'm % 3 != 0' does not hold: m = 3 (workload m3)"
            )

    def test_no_kernel_sees_it(self, project: Project) -> None:
        assert {("reference", 2, 4), ("sum", 2, 4)} <= calls(project)
        assert {(who, m) for who, m, _ in calls(project) if m == 3} == set()

    def test_it_is_refused_before_anything_is_drawn_and_whether_or_not_it_fits(self, run: Run) -> None:
        assert verdicts(run, "linear_huge-m3-") == verdicts(run, "linear_huge~twin-m3-") == {"error"}
        for outcome in outcomes(run, "linear_odd-m3-"):
            assert "inputs" not in outcome.hashes
            assert not outcome.seconds


class TestCut:
    def test_a_workload_that_does_not_fit_is_run_at_a_smaller_size(self, run: Run, project: Project) -> None:
        for outcome in outcomes(run, "linear_long-m4000000-"):
            assert outcome.verdict in (Verdict.MATCH, Verdict.MISSING)
            assert outcome.shrunk == {"m": (4_000_000, outcome.axes["m"])}
            assert outcome.reason.endswith(f"cut to fit into memory: m 4000000 -> {outcome.axes['m']}")
        cut = run.outcomes["linear_long-m4000000-sum"].axes["m"]
        assert 10_000 < cut < 400_000
        assert {m for _, m, n in calls(project) if n == 8} == {1, cut}

    def test_the_record_holds_the_axes_that_were_run(self, run: Run) -> None:
        assert run.outcomes["linear_long-m1-sum"].axes == {"m": 1, "n": 8, "k": 8}
        assert run.outcomes["linear_huge~twin-m2-sum"].axes == {"m": 2, "n": 2048, "k": 4096}

    def test_no_workload_outlives_its_last_case(self, project: Project) -> None:
        held = (project.root / "held").read_text()

        assert int(held) < 2**20  # a traceback that is kept holds 40 MiB of weights, say

    def test_weights_that_are_kept_leave_room_for_the_next_workload(self, run: Run) -> None:
        for outcome in outcomes(run, "linear_heavy-"):
            assert outcome.verdict in (Verdict.MATCH, Verdict.MISSING)
            assert not outcome.shrunk


class TestTwin:
    def test_weights_that_do_not_fit_are_not_run_and_the_reason_has_both_numbers(self, run: Run) -> None:
        told = {outcome.reason for outcome in outcomes(run, "linear_huge-m2-") if outcome.case.check != "agreement"}

        assert verdicts(run, "linear_huge-m2-") == {"not-run"}
        assert told == {
            "weights of 2.0 GiB are held 2 times, as drawn and as handed out; 96.0 MiB are free for this worker"
        }

    def test_its_twin_is_proven_beside_it(self, run: Run, project: Project) -> None:
        assert run.outcomes["linear_huge~twin-m2-sum"].verdict is Verdict.MATCH
        assert run.outcomes["linear_huge~twin-m2-determinism"].verdict is Verdict.MATCH
        assert {n for _, _, n in calls(project)} == {4, 8, 1024, 2048}

    def test_constants_that_cannot_shrink_are_an_error(self, run: Run) -> None:
        outcome = run.outcomes["linear_rigid-definition"]

        assert outcome.verdict is Verdict.ERROR
        assert "linear_rigid.json: constraints: leave no twin" in outcome.reason

    def test_the_class_of_the_definition_proves_its_twin_too(self, project: Project) -> None:
        done = project.run("--collect-only", "-q", "-k", "TestHuge")

        assert sum("[linear_huge~twin-" in line for line in done.stdout.splitlines()) == 12
        assert sum("[linear_huge-" in line for line in done.stdout.splitlines()) == 12

    def test_the_matrix_has_rows_for_both_and_counts_what_was_cut(self, project: Project, monkeypatch: Any) -> None:
        monkeypatch.chdir(project.root)
        printed = CliRunner(env={"COLUMNS": "100"}).invoke(main, ["matrix", "--definitions"]).output
        lines = [" ".join(line.split()) for line in printed.splitlines()]

        assert "linear_huge ✗ 6 error, 6 not-run" in lines
        assert lines[lines.index("linear_huge ✗ 6 error, 6 not-run") + 1] == "~twin ✗ 6 error, 2 missing, 4 match"
        assert "linear_long ? 4 missing, 8 match · 6 cut to fit" in lines
        assert "6 outcomes at sizes cut to fit into memory" in " ".join(lines)

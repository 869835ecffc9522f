"""Mutants that end their process: each is caught, the others have their own verdict, and the command goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dying
import pytest
from click.testing import CliRunner
from guards import published, table, write_products

from refgrid.commands.mutants import mutants as main
from refgrid.mutants.baseline import BASELINES, CHECKS, OWN_INPUTS
from refgrid.mutants.judging import Held, Judgement
from refgrid.mutants.running import Task, Told, judged, self_tests
from refgrid.mutants.table import Mutant
from refgrid.mutants.workers import Died
from refgrid.records.record import Verdict

REFERENCE, ADAPTER = table()["rmsnorm: weight plus one"], table()["rmsnorm: adapter: weight plus one"]
GREEN = dict.fromkeys(CHECKS, False)
CRASH, HANG = Died(Verdict.CRASH, "the process died: killed by SIGSEGV"), Died(Verdict.HANG, "not done within 1 s")
KILLED = Died(Verdict.OOM, "the process died: killed by SIGKILL, as the kernel does when memory runs out")
OWN: Held = ("torch", "numerics")


class Scripted:
    """A worker that answers as it is told to, by what it is asked and whom about; what it is held to, it keeps."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.without: tuple[Any, ...] = ()

    def call(self, _: Task, what: str, *given: Any) -> Any:
        told = getattr(self, what)(*given)
        if isinstance(told, Died):
            raise told
        return told

    def sound(self, source: str | None, check: str) -> Any:
        every: Mapping[Any, Any] = self.answers.get("sound", {})
        return every.get((source, check), every.get("all", ""))

    def judge(self, _: Mutant, without: tuple[Any, ...]) -> Any:
        self.without = without
        return self.answers.get("judge", Judgement("edge", "same"))

    def by_documents(self, _: str, inputs: str, mutant: Mutant | None) -> Any:
        checks = BASELINES if inputs == "laid" else [OWN_INPUTS]
        return self.answers.get(f"{inputs} sound" if mutant is None else inputs, dict.fromkeys(checks, False))


def told_by(worker: Any, mutant: Mutant = REFERENCE) -> Told:
    return judged(worker, Task("", mutant.where, "edge", (mutant,), "cpu", "rmsnorm"))


@pytest.mark.parametrize("death", [CRASH, HANG], ids=["crash", "hang"])
def test_a_mutant_that_is_the_end_of_its_process_is_caught_with_the_words_for_it(death: Died) -> None:
    told = told_by(Scripted(judge=death))

    assert told.judged[REFERENCE.id] == Judgement(
        "edge", "caught", death.verdict.value, reason=death.reason, fixed=GREEN
    )


def test_the_documents_checks_are_red_where_the_process_ends_and_there_alone() -> None:
    on_plain, on_laid = told_by(Scripted(plain=HANG)), told_by(Scripted(laid=CRASH, judge=CRASH))

    assert on_plain.judged[REFERENCE.id].fate == "same"
    assert on_plain.judged[REFERENCE.id].fixed == {**GREEN, OWN_INPUTS: True}
    assert on_laid.judged[REFERENCE.id].fixed == {**dict.fromkeys(CHECKS, True), OWN_INPUTS: False}


def test_a_mutant_whose_process_is_killed_from_outside_is_not_caught() -> None:
    told = told_by(Scripted(judge=KILLED, plain=KILLED, laid=KILLED))

    assert told.judged[REFERENCE.id] == Judgement("edge", "not-run", "oom", reason=KILLED.reason)
    assert told_by(Scripted(plain=KILLED, laid=KILLED)).judged[REFERENCE.id].fixed == GREEN


def test_a_false_alarm_that_ends_the_process_is_one() -> None:
    told = told_by(Scripted(**{"plain sound": CRASH}))

    assert told.alarms == {"torch": {**GREEN, OWN_INPUTS: True}}
    assert told.judged[REFERENCE.id].fixed == GREEN


@pytest.mark.parametrize("red", [CRASH, "mismatch: output is off"], ids=["crash", "mismatch"])
def test_no_mutant_is_held_to_what_the_sound_code_fails(red: Any) -> None:
    worker = Scripted(sound={OWN: red})
    told = told_by(worker)

    assert worker.without == (OWN,)
    assert list(told.unsound) == [OWN]
    assert told.unsound[OWN] in ("crash: the process died: killed by SIGSEGV", "mismatch: output is off")


def test_where_the_sound_code_fails_altogether_nothing_runs_and_the_reason_is_told() -> None:
    every, adapter = Scripted(sound={"all": CRASH}, judge=CRASH), Scripted(sound={OWN: CRASH}, judge=CRASH)
    reason = "the sound code ends in crash: the process died: killed by SIGSEGV"

    assert told_by(every).judged[REFERENCE.id] == Judgement("edge", "not-run", reason=reason)
    assert told_by(adapter, ADAPTER).judged[ADAPTER.id] == Judgement("edge", "not-run", reason=reason)


def test_a_faulty_adapter_that_ends_its_self_test_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deadly(Scripted):
        def __init__(self, *_: Any) -> None: ...

        def call(self, *_: Any) -> Any:
            raise CRASH

        def close(self) -> None: ...

    monkeypatch.setattr("refgrid.mutants.running.Worker", Deadly)
    assert self_tests(published(), [REFERENCE, ADAPTER], 1, 60) == {
        ADAPTER.id: "crash: the process died: killed by SIGSEGV"
    }


WAYS = ("SIGSEGV", "SIGKILL", "lost late")


def test_the_command_survives_its_mutants(tmp_path: Path) -> None:
    write_products(tmp_path, {way: f"import dying\ndying.once('{tmp_path / way}', '{way}')" for way in WAYS})

    done = CliRunner().invoke(main, [f"--dataset={tmp_path}", f"--output={tmp_path}"], env={"COLUMNS": "200"})

    assert done.exit_code == 1, done.output  # of the mutant that changes nothing
    data = json.loads((tmp_path / "mutants.json").read_text())
    found = {one["id"].removeprefix("gemm: "): one["verdicts"][0]["workloads"]["edge_m129"] for one in data["mutants"]}
    assert {name: one.get("verdict") or one["fate"] for name, one in found.items()} == {
        "SIGSEGV": "crash",
        "SIGKILL": "oom",
        "lost late": "crash",
        "zero": "mismatch",
        "nothing": "same",
    }
    assert found["SIGSEGV"]["reason"].startswith("the process died: killed by SIGSEGV")
    assert found["SIGKILL"]["fate"] == "not-run"
    assert found["lost late"]["reason"] == f"the CUDA context is lost after it: {dying.LOST}"
    assert data["runs"][0]["unsound"] == []
